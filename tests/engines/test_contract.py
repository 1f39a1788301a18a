"""The contract of engines, and how all of them fail: llama.cpp, the clients of vLLM and SGLang on their
protocols, and the relay in front of a chat upstream.

A real vLLM keeps it in tests/service/test_vllm.py.
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deepseek_api_compat.config import EngineSettings, ModelSettings, Settings
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import Capabilities, Endpoint, ModelInfo, TokenEngine
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.llamacpp import LlamaCpp, with_files
from deepseek_api_compat.engines.sglang import SgLang
from deepseek_api_compat.engines.upstream import Hung, Lost
from deepseek_api_compat.engines.vllm import Vllm
from deepseek_api_compat.errors import (
    ApiError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.gateway.replicas import replicas_of
from deepseek_api_compat.protocol.grammar import text as exactly
from deepseek_api_compat.protocol.job import Job, Sampling
from engines.contract import (
    SLOW,
    Contract,
    Speaker,
    Spoken,
    Subject,
    Tokens,
    heard,
    ids_of,
    run,
    text_of,
)
from engines.relayed import Replicas
from fakes.http_server import HttpServer, Peer, chunked, ok
from fakes.token_servers import (
    BEGIN,
    CONTROLS,
    END,
    SONG,
    USER,
    FakeChat,
    FakeLlamaCpp,
    FakeSglang,
    FakeVllm,
    Singing,
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
        prompt = await engine.tokenize("".join(f"{number} " for number in range(201, 240)), special=False)
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


class TestRelay(Spoken):
    """A chat upstream, one token an event and several. contract.py says what can't be asked of it."""

    @pytest.fixture(params=[1, 3], ids=["token by token", "three at a time"])
    async def speaker(self, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Speaker]:
        server = FakeChat(tmp_path, step=request.param)
        async with singing(server) as endpoint, Wire("openai", server).speak(endpoint) as speaker:
            yield speaker
            await speaker.close()
            assert server.open == 0

    async def test_it_says_what_the_upstream_said(self, speaker: Speaker) -> None:
        text, counts = await heard(speaker, self.length)
        song = Singing([BEGIN, USER, *b"Sing."], self.length, [], {})
        while song.finish is None:
            song.step()
        assert text == song.text
        assert counts == (len(song.prompt), self.length, 2)


class Wire:
    """A protocol to break. server: it as it should be; first: an event of it with the text E.

    broken: an event that makes no sense behind that one; early: an end that comes too early.
    """

    def __init__(
        self, kind: str, server: SongServer, first: bytes = b"", broken: bytes = b"", early: bytes = b""
    ) -> None:
        self.kind = kind
        self.server = server
        self.first = first
        self.broken = broken
        self.early = [early] if early else []

    def settings(self, **more: Any) -> EngineSettings:
        place = {"base_url": "http://unused/v1"} if self.kind == "openai" else {"path": "song"}
        return EngineSettings(kind=self.kind, **{**place, **more})  # type: ignore[arg-type]

    def connect(self, endpoint: Endpoint) -> TokenEngine:
        """A client of a token engine."""
        return kinds.connect(self.settings(), endpoint, SONG_INFO)

    @asynccontextmanager
    async def speak(self, *endpoints: Endpoint, silence: float = SLOW) -> AsyncIterator[Speaker]:
        """The client of a token engine; the relay for a chat upstream, and the pool of several of each.

        silence: seconds that it bears.
        """
        prompt = [BEGIN, USER, *b"Sing."]
        settings = self.settings(read_timeout=silence, stall_timeout=silence)
        if self.kind != "openai" and len(endpoints) == 1:
            tokens = Tokens(kinds.connect(settings, endpoints[0], SONG_INFO), prompt)
            yield tokens
            await tokens.close()
            return
        if self.kind == "openai":
            endpoints = tuple(msgspec.structs.replace(one, base="/v1") for one in endpoints)
        replicas = Replicas(settings, endpoints, SONG_INFO, prompt)
        try:
            yield replicas
        finally:
            await replicas.close()
            replicas.free()


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def wire_of(kind: str, folder: Path) -> Wire:
    meta = {"finish_reason": None, "prompt_tokens": 3, "completion_tokens": 1}
    if kind == "openai":
        first = event({"choices": [{"index": 0, "delta": {"content": "E"}, "finish_reason": None}]})
        wrong = event({"choices": [], "usage": {"prompt_tokens": "x"}})
        return Wire(kind, FakeChat(folder), first, wrong)
    if kind == "llamacpp":
        one = {"content": "E", "tokens": [69], "stop": False, "tokens_predicted": 1, "tokens_evaluated": 3}
        return Wire(kind, FakeLlamaCpp(folder), event(one), event({**one, "tokens": "E"}))
    if kind == "vllm":
        choice = {"index": 0, "text": "E", "token_ids": [69], "finish_reason": None}
        wrong = event({"choices": [{"text": "i", "token_ids": "i"}]})
        return Wire(kind, FakeVllm(folder), event({"choices": [choice]}), wrong, b"data: [DONE]\n\n")
    first = event({"text": "E", "output_ids": [69], "meta_info": meta})
    wrong = event({"text": "E", "output_ids": [1], "meta_info": {**meta, "completion_tokens": 9}})
    return Wire(kind, FakeSglang(folder), first, wrong, b"data: [DONE]\n\n")


@pytest.fixture(params=["llamacpp", "vllm", "sglang", "openai"])
def wire(request: pytest.FixtureRequest, tmp_path: Path) -> Wire:
    return wire_of(request.param, write_folder(tmp_path / "song"))


@pytest.fixture(params=["vllm", "sglang", "openai"])
def whole_wire(request: pytest.FixtureRequest, tmp_path: Path) -> Wire:
    """One whose server can do everything."""
    return wire_of(request.param, write_folder(tmp_path / "song"))


@pytest.fixture(params=["vllm", "sglang"])
def token_wire(request: pytest.FixtureRequest, tmp_path: Path) -> Wire:
    return wire_of(request.param, write_folder(tmp_path / "song"))


async def broken(
    wire: Wire, answer: bytes, *, stays: bool = False, silence: float = SLOW
) -> tuple[str, ApiError]:
    """The text that came of an answer that breaks, and how it ended. stays: the connection, after it."""
    script = saying(wire.server.generating, answer, wire.server, stays=stays)
    async with HttpServer(script) as server, wire.speak(server.endpoint, silence=silence) as speaker:
        return await failure(speaker)


async def failure(speaker: Speaker) -> tuple[str, ApiError]:
    text = ""
    try:
        async for part in speaker.say(30):
            assert isinstance(part, str), "it came to an end"
            text += part
    except ApiError as error:
        return text, error
    raise AssertionError("it did not break")


async def test_nobody_there(wire: Wire) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        async with wire.speak(Endpoint(port=holder.getsockname()[1])) as speaker:
            text, error = await failure(speaker)
    assert text == ""
    assert type(error) is EngineUnavailable
    assert error.retry_after


async def test_death_before_the_first_piece(wire: Wire) -> None:
    text, error = await broken(wire, b"")
    assert text == ""
    assert isinstance(error, EngineUnavailable)


async def test_death_after_the_first_piece(wire: Wire) -> None:
    text, error = await broken(wire, chunked(wire.first, end=False))
    assert text == "E"
    assert isinstance(error, Lost)


async def test_an_end_before_the_answer_is_complete(wire: Wire) -> None:
    text, error = await broken(wire, chunked(wire.first, *wire.early))
    assert text == "E"
    assert isinstance(error, Lost)


@pytest.mark.parametrize(
    ("before", "kind"), [(b"", EngineTimeout), (b"HTTP/1.1 200 OK\r\n", EngineTimeout), (None, Hung)]
)
async def test_silence(wire: Wire, before: bytes | None, kind: type[ApiError]) -> None:
    said = chunked(wire.first, end=False) if before is None else before
    text, error = await broken(wire, said, stays=True, silence=0.5)
    assert text == ("E" if before is None else "")
    assert type(error) is kind
    assert "0.5 seconds" in error.message


@pytest.mark.parametrize("garbage", [b"data: {nonsense\n\n", b'data: {"choices": 1, "meta_info": 2}\n\n'])
async def test_garbage(wire: Wire, garbage: bytes) -> None:
    """A relay passes on what it doesn't read; but no answer was complete in this way."""
    text, error = await broken(wire, chunked(wire.first, garbage))
    assert text in ("E", "")
    assert isinstance(error, EngineFailed)


async def test_garbage_instead_of_http(wire: Wire) -> None:
    text, error = await broken(wire, chunked(wire.first, end=False) + b"no length\r\n")
    assert text == "E"
    assert isinstance(error, Lost)


async def test_an_event_without_end(wire: Wire) -> None:
    endless = b"data: " + b"x" * (17 << 20)
    text, error = await broken(wire, chunked(wire.first, endless, end=False), stays=True)
    assert text == "E"
    assert isinstance(error, EngineFailed)
    assert "over 16 MiB" in error.message


async def test_events_that_do_not_add_up(wire: Wire) -> None:
    _, error = await broken(wire, chunked(wire.first, wire.broken))
    assert isinstance(error, EngineFailed)


async def test_an_error_in_the_stream(wire: Wire) -> None:
    answer = event({"error": {"message": "out of memory", "code": 500}})
    text, error = await broken(wire, chunked(wire.first, answer))
    assert text in ("E", "")
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


@pytest.mark.parametrize("moment", ["before the answer", "in the headers", "in the answer"])
async def test_who_leaves_closes_the_connection(wire: Wire, moment: str) -> None:
    said = {"before the answer": b"", "in the headers": b"HTTP/1.1 200 OK\r\n"}
    answer = said.get(moment, chunked(wire.first, end=False))
    asked, left, began = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        request = await peer.request()
        assert request is not None
        assert request.path == wire.server.generating
        await peer.send(answer)
        asked.set()
        await peer.closed()
        left.set()

    async def read(speaker: Speaker) -> None:
        async for _ in speaker.say(30):
            began.set()

    async with HttpServer(script) as server, wire.speak(server.endpoint) as speaker:
        reading = asyncio.ensure_future(read(speaker))
        await asyncio.wait_for((began if moment == "in the answer" else asked).wait(), SLOW)
        assert not left.is_set()
        reading.cancel()
        await asyncio.wait_for(left.wait(), SLOW)
        with pytest.raises(asyncio.CancelledError):
            await reading


async def test_a_drained_one_gets_nothing_new_and_no_answer_is_lost(whole_wire: Wire) -> None:
    """Answers of token engines go on at another replica; those of a chat upstream stay to their end."""
    kind, folder = type(whole_wire.server), whole_wire.server.folder
    servers = [kind(folder, pace=0.02) for _ in range(2)]
    async with AsyncExitStack() as stack:
        places = [await stack.enter_async_context(singing(server)) for server in servers]
        speaker = await stack.enter_async_context(whole_wire.speak(*places))
        assert isinstance(speaker, Replicas)
        undisturbed = await heard(speaker, 30)
        async with aclosing(speaker.say(30)) as answer:
            text = str(await answer.__anext__())
            [busy] = [number for number, server in enumerate(servers) if server.open]
            await speaker.drain(busy)
            asked = len(servers[busy].requests)
            assert await asyncio.gather(*(heard(speaker, 30) for _ in range(3))) == [undisturbed] * 3
            *rest, counts = [part async for part in answer]
        assert text + "".join(map(str, rest)) == undisturbed[0]
        assert counts == undisturbed[1]
        assert len(servers[busy].requests) == asked


async def test_health_is_followed(whole_wire: Wire) -> None:
    """As the supervisor sees a server that is not its own."""
    lifeline, changed = Lifeline(), asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.callback(lifeline.close)
        server = await stack.enter_async_context(AsyncExitStack())
        place = await server.enter_async_context(singing(whole_wire.server))
        settings = whole_wire.settings(path=None, base_url=f"http://127.0.0.1:{place.port}/v1")
        models = [ModelSettings(name="m", engines=[settings])]
        [replica] = replicas_of(Settings(models=models), lifeline, lambda _: changed.set())
        stack.push_async_callback(replica.stop)
        await replica.start()
        assert replica.describe().state == "ready"
        # What it can do is known of a token engine; a chat upstream is only known to be there.
        context = None if replica.info is None else replica.info.context
        assert context == (None if whole_wire.kind == "openai" else SONG_INFO.context)
        replica.drain()
        replica.doubt(False)
        assert replica.describe().state == "drained"
        await replica.restart()
        assert replica.describe().state == "ready"
        await server.aclose()
        changed.clear()
        replica.doubt(False)
        while (state := replica.describe()).state in ("ready", "doubtful"):
            changed.clear()
            await asyncio.wait_for(changed.wait(), SLOW)
        assert (state.state, "Can't reach the engine" in state.detail) == ("starting", True)


async def test_a_dead_core_behind_a_live_server(tmp_path: Path) -> None:
    """vLLM's server says so for a while after the process that computes has died."""
    dead = {"message": "EngineCore encountered an issue.", "code": 500}
    wire = wire_of("vllm", write_folder(tmp_path))
    _, error = await broken(wire, ok(json.dumps({"error": dead}).encode(), status="500 Internal"))
    assert isinstance(error, EngineUnavailable)
    _, error = await broken(wire, chunked(event({"error": dead})))
    assert isinstance(error, EngineUnavailable)
    text, error = await broken(wire, chunked(wire.first + event({"error": dead})))
    assert isinstance(error, EngineUnavailable if not text else Lost)


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


async def test_no_grammar_where_the_engine_can_not_keep_it(token_wire: Wire) -> None:
    info = ModelInfo(context=100, slots=1, can=Capabilities(grammar=False))
    async with singing(token_wire.server) as endpoint:
        engine = kinds.connect(EngineSettings(kind=token_wire.kind, path="x"), endpoint, info)  # type: ignore[arg-type]
        with pytest.raises(InvalidRequest, match="held to a format: start"):
            await run(engine, Job([1], 5, grammar=exactly("x")))
        await engine.close()


async def test_penalties_of_an_answer_that_goes_on(token_wire: Wire) -> None:
    """What another engine has made is a part of the prompt here, for which these engines ask no penalty."""
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={7: 1.0})
    async with singing(token_wire.server) as endpoint:
        engine = token_wire.connect(endpoint)
        await run(engine, Job([7, 7, 7, 8, 7], 1, sampling, sent=3))
        await run(engine, Job([7, 7, 7, 8, 7], 1, sampling))
        await engine.close()
    bodies = [body for path, body in token_wire.server.requests if path == token_wire.server.generating]
    found = [body.get("sampling_params", body)["logit_bias"] for body in bodies]
    assert found == [{"7": 1.0 - 0.5 - 2 * 0.25, "8": -0.75}, {"7": 1.0}]


async def test_examined_engines_are_known_by_their_files(token_wire: Wire) -> None:
    settings = EngineSettings(kind=token_wire.kind, base_url="http://unused", batch_size=3)  # type: ignore[arg-type]
    async with singing(token_wire.server) as endpoint:
        info = await kinds.examine(settings, endpoint, None)
    assert (info.context, info.slots, info.controls) == (4096, 3, CONTROLS)
    assert (info.bos, info.eos, info.can.grammar) == (
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
        True,
    )
