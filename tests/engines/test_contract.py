"""The contract of token engines, kept by llama.cpp, and by the clients of vLLM and SGLang on their protocols.

A real vLLM keeps it in tests/service/test_vllm.py.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import Capabilities, Endpoint, ModelInfo, TokenEngine
from deepseek_api_compat.engines.llamacpp import LlamaCpp, with_files
from deepseek_api_compat.engines.sglang import SgLang
from deepseek_api_compat.engines.upstream import Lost
from deepseek_api_compat.engines.vllm import Vllm
from deepseek_api_compat.errors import ApiError, EngineFailed, EngineUnavailable, InvalidRequest
from deepseek_api_compat.protocol.grammar import text as exactly
from deepseek_api_compat.protocol.job import Job, Sampling
from engines.contract import Contract, Subject, ids_of, run, text_of
from fakes.http_server import HttpServer, chunked, ok
from fakes.token_servers import (
    BEGIN,
    CONTROLS,
    END,
    SONG,
    FakeSglang,
    FakeVllm,
    SongServer,
    saying,
    singing,
    write_folder,
)

SONG_INFO = ModelInfo(context=4096, slots=4, controls=CONTROLS)


@pytest.mark.embedded
class TestLlamaCpp(Contract):
    @pytest.fixture
    async def subject(self, model_path: Path, engine_endpoint: Endpoint) -> AsyncIterator[Subject]:
        stranger = LlamaCpp(engine_endpoint)
        info = with_files(await stranger.info(), model_path)
        await stranger.close()
        engine = LlamaCpp(engine_endpoint, known=info)
        prompt = await engine.tokenize("😀😃😀😃😀😃 one two three four five six", special=False)
        yield Subject(engine, info, prompt, "<|im_start|>")
        await engine.close()


class TestVllm(Contract):
    """On its recorded protocol, one token an event and several."""

    @pytest.fixture(params=[1, 3], ids=["token by token", "three at a time"])
    async def subject(self, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
        server = FakeVllm(write_folder(tmp_path / "song"), step=request.param)
        async with singing(server) as endpoint:
            engine = Vllm(endpoint, slots=4, known=SONG_INFO)
            yield Subject(engine, SONG_INFO, [BEGIN, *SONG[:3]], "<｜User｜>")
            await engine.close()
            assert server.open == 0


class TestSgLang(Contract):
    """On its recorded protocol: cumulative, new ids beside all text, and new ids and text."""

    @pytest.fixture(params=[False, "ids", True], ids=["cumulative", "new ids", "new ids and text"])
    async def subject(self, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
        server = FakeSglang(write_folder(tmp_path / "song"), incremental=request.param)
        async with singing(server) as endpoint:
            engine = SgLang(endpoint, slots=4, known=SONG_INFO)
            yield Subject(engine, SONG_INFO, [BEGIN, *SONG[:3]], "<｜User｜>")
            await engine.close()


class Wire:
    """A protocol to break: how an event of it looks."""

    def __init__(self, kind: str, server: SongServer, first: bytes, broken: bytes) -> None:
        self.kind = kind
        self.server = server
        self.first = first
        self.broken = broken

    def connect(self, endpoint: Endpoint) -> TokenEngine:
        settings = EngineSettings(kind=self.kind, path="song", connect_timeout=5.0)  # type: ignore[arg-type]
        return kinds.connect(settings, endpoint, SONG_INFO)


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


@pytest.fixture(params=["vllm", "sglang"])
def wire(request: pytest.FixtureRequest, tmp_path: Path) -> Wire:
    folder = write_folder(tmp_path / "song")
    if request.param == "vllm":
        first = event({"choices": [{"index": 0, "text": "E", "token_ids": [69], "finish_reason": None}]})
        return Wire("vllm", FakeVllm(folder), first, event({"choices": [{"text": "i", "token_ids": "i"}]}))
    meta = {"finish_reason": None, "prompt_tokens": 3, "completion_tokens": 1}
    first = event({"text": "E", "output_ids": [69], "meta_info": meta})
    again = event({"text": "E", "output_ids": [1], "meta_info": {**meta, "completion_tokens": 9}})
    return Wire("sglang", FakeSglang(folder), first, again)


async def broken(wire: Wire, answer: bytes) -> tuple[list[int], ApiError]:
    """The ids that came of an answer that breaks, and how it ended."""
    ids: list[int] = []
    async with HttpServer(saying(wire.server.generating, answer, wire.server)) as server:
        engine = wire.connect(server.endpoint)
        try:
            async for pieces in engine.stream(Job([BEGIN, 1, 2], 30)):
                ids += ids_of(pieces)
        except ApiError as error:
            return ids, error
        finally:
            await engine.close()
    raise AssertionError("it did not break")


async def test_death_before_the_first_piece(wire: Wire) -> None:
    ids, error = await broken(wire, b"")
    assert ids == []
    assert isinstance(error, EngineUnavailable)


async def test_death_after_the_first_piece(wire: Wire) -> None:
    ids, error = await broken(wire, chunked(wire.first, end=False))
    assert ids == [69]
    assert isinstance(error, Lost)


async def test_an_end_before_the_answer_is_complete(wire: Wire) -> None:
    ids, error = await broken(wire, chunked(wire.first, b"data: [DONE]\n\n"))
    assert ids == [69]
    assert isinstance(error, Lost)


@pytest.mark.parametrize("garbage", [b"data: {nonsense\n\n", b'data: {"choices": 1, "meta_info": 2}\n\n'])
async def test_garbage(wire: Wire, garbage: bytes) -> None:
    ids, error = await broken(wire, chunked(wire.first, garbage))
    assert ids in ([69], [])
    assert isinstance(error, EngineFailed)


async def test_events_that_do_not_add_up(wire: Wire) -> None:
    _, error = await broken(wire, chunked(wire.first, wire.broken))
    assert isinstance(error, EngineFailed)


async def test_an_error_in_the_stream(wire: Wire) -> None:
    answer = event({"error": {"message": "out of memory", "code": 500}})
    ids, error = await broken(wire, chunked(wire.first, answer))
    assert ids in ([69], [])
    assert isinstance(error, EngineFailed)
    assert "out of memory" in error.message


@pytest.mark.parametrize(
    ("status", "kind"),
    [("400 Bad Request", InvalidRequest), ("503 Busy", EngineUnavailable), ("500 Oh", EngineFailed)],
)
async def test_refusals(wire: Wire, status: str, kind: type[ApiError]) -> None:
    refused = ok(b'{"error": {"message": "because"}}', status=status)
    _, error = await broken(wire, refused)
    assert type(error) is kind
    assert "because" in error.message
    _, error = await broken(wire, ok(b"<html>", status=status))
    assert type(error) is kind


async def test_a_dead_core_behind_a_live_server(tmp_path: Path) -> None:
    """vLLM's server says so for a while after the process that computes has died."""
    dead = {"message": "EngineCore encountered an issue.", "code": 500}
    wire = Wire("vllm", FakeVllm(write_folder(tmp_path)), b"", b"")
    _, error = await broken(wire, ok(json.dumps({"error": dead}).encode(), status="500 Internal"))
    assert isinstance(error, EngineUnavailable)
    _, error = await broken(wire, chunked(event({"error": dead})))
    assert isinstance(error, EngineUnavailable)
    first = event({"choices": [{"index": 0, "text": "E", "token_ids": [69], "finish_reason": None}]})
    ids, error = await broken(wire, chunked(first + event({"error": dead})))
    assert isinstance(error, EngineUnavailable if not ids else Lost)


async def test_counts_lost_with_the_connection_are_no_reason_to_fail(tmp_path: Path) -> None:
    choice = {"index": 0, "text": "E", "token_ids": [69], "finish_reason": "length"}
    answer = chunked(event({"choices": [choice]}), end=False)
    async with HttpServer(saying("/v1/completions", answer, FakeVllm(write_folder(tmp_path)))) as server:
        engine = Vllm(server.endpoint, known=SONG_INFO)
        pieces = await run(engine, Job([BEGIN, 1], 1))
        await engine.close()
    last = pieces[-1]
    assert (last.finish, last.prompt_tokens, last.completion_tokens) == ("length", 2, 1)


async def test_markers_show_and_other_control_tokens_do_not(tmp_path: Path) -> None:
    """They come spelled out, all of them, and the end token too when a stop string is looked for."""
    text = "a<｜User｜>b<｜end▁of▁sentence｜>"
    choice = {"index": 0, "text": text, "token_ids": [97, 258, 98, END], "finish_reason": "stop"}
    answer = chunked(event({"choices": [choice]}))
    async with HttpServer(saying("/v1/completions", answer, FakeVllm(write_folder(tmp_path)))) as server:
        engine = Vllm(server.endpoint, known=SONG_INFO)
        pieces = await run(engine, Job([BEGIN, 1], 9, markers=("<｜User｜>",)))
        await engine.close()
    assert text_of(pieces) == "a<｜User｜>b"
    assert ids_of(pieces) == [97, 258, 98, END]


async def test_no_grammar_where_the_engine_can_not_keep_it(wire: Wire) -> None:
    info = ModelInfo(context=100, slots=1, can=Capabilities(grammar=False))
    async with singing(wire.server) as endpoint:
        engine = kinds.connect(EngineSettings(kind=wire.kind, path="x"), endpoint, info)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="held to a format: start"):
            await run(engine, Job([1], 5, grammar=exactly("x")))
        await engine.close()


async def test_penalties_of_an_answer_that_goes_on(wire: Wire) -> None:
    """What another engine has made is a part of the prompt here, for which these engines ask no penalty."""
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 1.0})
    async with singing(wire.server) as endpoint:
        engine = wire.connect(endpoint)
        await run(engine, Job([7, 7, 7, 8, 7], 1, sampling, sent=3))
        await run(engine, Job([7, 7, 7, 8, 7], 1, sampling))
        await engine.close()
    bodies = [body for path, body in wire.server.requests if path == wire.server.generating]
    found = [body.get("sampling_params", body)["logit_bias"] for body in bodies]
    assert found == [{"7": 1.0 - 0.5 - 2 * 0.25, "8": -0.75}, {"7": 1.0}]


async def test_examined_engines_are_known_by_their_files(wire: Wire) -> None:
    settings = EngineSettings(kind=wire.kind, base_url="http://unused", batch_size=3)  # type: ignore[arg-type]
    async with singing(wire.server) as endpoint:
        info = await kinds.examine(settings, endpoint, None)
    assert (info.context, info.slots, info.controls) == (4096, 3, CONTROLS)
    assert (info.bos, info.eos, info.can.grammar) == (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        True,
    )
