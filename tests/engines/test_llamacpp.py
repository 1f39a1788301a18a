"""The llama.cpp engine: a real one, and a scripted server for what a real one won't show."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path

import pytest

from deepseek_api_compat.config import EngineSettings
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.kinds import listening_place, managed
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.llamacpp import LlamaCpp
from deepseek_api_compat.engines.readiness import ready
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.errors import (
    ApiError,
    ConfigError,
    ContextTooLong,
    EngineFailed,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.protocol.grammar import Json
from deepseek_api_compat.protocol.job import Job, Piece, Sampling
from fakes.http_server import HttpServer, Script, answering, chunked, ok

GREEDY = Sampling(temperature=0.0)
ENDLESS = Sampling(logit_bias={0: -100.0, 2: -100.0})  # the model's two end tokens
NAME = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}},
    "required": ["name"],
    "additionalProperties": False,
}


async def run(engine: LlamaCpp, job: Job) -> list[Piece]:
    return [piece async for pieces in engine.stream(job) for piece in pieces]


def text(pieces: list[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids(pieces: list[Piece]) -> list[int]:
    return [token for piece in pieces for token in piece.ids]


async def chat(engine: LlamaCpp, question: str) -> list[int]:
    prompt = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return await engine.tokenize(prompt, special=True)


async def busy(endpoint: Endpoint) -> int:
    """How many slots are at work."""
    upstream = Upstream(endpoint)
    _, body = await upstream.fetch("GET", "/slots")
    await upstream.close()
    return sum(slot["is_processing"] for slot in json.loads(body))


COUNTING = "".join(f"{number} " for number in range(201, 240))  # how that goes on is beyond doubt


async def slots_within(endpoint: Endpoint, wanted: int, seconds: float) -> None:
    """Wait until that many slots are at work."""
    clock = asyncio.get_running_loop().time
    deadline = clock() + seconds
    while await busy(endpoint) != wanted:
        assert clock() < deadline, f"not {wanted} slots at work within {seconds} s"
        await asyncio.sleep(0.005)


# A real engine


@pytest.mark.embedded
async def test_what_it_says_of_its_model(engine: LlamaCpp) -> None:
    info = await ready(engine)
    assert (info.context, info.slots) == (1024, 8)
    assert (info.bos, info.eos) == ("<|im_start|>", "<|im_end|>")
    assert info.chat_template is not None
    assert "im_start" in info.chat_template


@pytest.mark.embedded
async def test_tokens_and_back(engine: LlamaCpp) -> None:
    sentence = "The sea, 漢字 and 😀<|im_end|>"
    plain = await engine.tokenize(sentence, special=False)
    special = await engine.tokenize(sentence, special=True)
    assert special[-1] == 2
    assert len(plain) > len(special)
    assert await engine.detokenize(plain) == sentence
    assert await engine.tokenize("", special=False) == []


@pytest.mark.embedded
async def test_an_answer_and_its_counts(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "What is the capital of France?")
    pieces = await run(engine, Job(prompt, 12, GREEDY))
    assert "Paris" in text(pieces)
    assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    last = pieces[-1]
    assert last.finish == "length"
    assert last.prompt_tokens == len(prompt)
    assert last.completion_tokens == len(ids(pieces))
    again = await run(engine, Job(prompt, 3, GREEDY))
    assert again[-1].cached_tokens > 0
    assert ids(again) == ids(pieces)[:3]


@pytest.mark.embedded
async def test_a_job_and_the_ids_so_far_are_a_new_job(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "Count from one to ten.")
    whole = ids(await run(engine, Job(prompt, 12, GREEDY)))
    rest = ids(await run(engine, Job(prompt + whole[:5], 7, GREEDY)))
    assert whole[:5] + rest == whole


@pytest.mark.embedded
async def test_characters_of_several_tokens_come_whole_and_with_all_ids(engine: LlamaCpp) -> None:
    prompt = await engine.tokenize("one two 😀😃 " * 14 + "one", special=False)
    pieces = await run(engine, Job(prompt, 10, GREEDY))
    assert [piece.text for piece in pieces if piece.text] == [" two", " 😀", "😃", " one", " two", " 😀"]
    assert [len(piece.ids) for piece in pieces if piece.text] == [1, 2, 3, 1, 1, 2]
    assert await engine.detokenize(ids(pieces)) == text(pieces)


@pytest.mark.embedded
async def test_stop_strings_are_not_part_of_the_answer(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "What is the capital of France?")
    pieces = await run(engine, Job(prompt, 40, GREEDY, stop=(" Paris", "never")))
    assert text(pieces) == "The capital of France is"
    assert pieces[-1].finish == "stop"


@pytest.mark.embedded
async def test_no_id_comes_before_its_text(engine: LlamaCpp) -> None:
    """What may be the beginning of a stop string is held back, ids and text."""
    prompt = await engine.tokenize(COUNTING, special=False)
    plain = await run(engine, Job(prompt, 20, GREEDY))
    second = plain[1].text
    pieces = await run(engine, Job(prompt, 20, GREEDY, stop=(second + "?!",)))
    assert text(pieces) == text(plain)
    assert ids(pieces) == ids(plain)
    assert all(piece.text for piece in pieces[:-1])
    assert pieces[1].ids == plain[1].ids + plain[2].ids


@pytest.mark.embedded
@pytest.mark.parametrize("top", [None, 0])
async def test_the_limit_loses_no_text(engine: LlamaCpp, top: int | None) -> None:
    """Not even text that may be the beginning of a stop string, when no more can follow."""
    prompt = await engine.tokenize("The capital of France is the city of", special=False)
    plain = await run(engine, Job(prompt, 4, GREEDY, top_logprobs=top))
    stop = plain[3].text + "?!"
    pieces = await run(engine, Job(prompt, 4, GREEDY, stop=(stop,), top_logprobs=top))
    assert (text(pieces), ids(pieces)) == (text(plain), ids(plain))
    assert pieces[-1].finish == "length"
    if top is not None:
        assert sum(len(piece.logprobs or ()) for piece in pieces) == 4


@pytest.mark.embedded
async def test_same_seed_same_answer(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "Tell me a story.")
    # The very first one finds less in the cache than the others, and computes a little differently.
    _, first, second, other = [
        text(await run(engine, Job(prompt, 6, Sampling(temperature=1.5, seed=seed)))) for seed in (1, 1, 1, 2)
    ]
    assert first == second != other


@pytest.mark.embedded
async def test_logit_bias(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "What is the capital of France?")
    (sea,) = await engine.tokenize(" sea", special=False)
    pieces = await run(engine, Job(prompt, 2, Sampling(temperature=0.0, logit_bias={sea: 100.0})))
    assert text(pieces) == " sea sea"


@pytest.mark.embedded
async def test_penalties(engine: LlamaCpp) -> None:
    prompt = await engine.tokenize("a b a b a b a b a b a b a", special=False)

    async def answer(**penalties: float) -> str:
        return text(await run(engine, Job(prompt, 8, Sampling(temperature=0.0, **penalties))))

    assert await answer() == " b a b a b a b a"
    # The prompt's own repetitions don't count against the answer's first ones.
    repeated = await answer(frequency_penalty=2.0)
    assert repeated.startswith(" b a")
    assert repeated != " b a b a b a b a"
    assert not (await answer(presence_penalty=2.0)).startswith(" b a")


@pytest.mark.embedded
@pytest.mark.parametrize("top", [0, 3])
async def test_logprobs(engine: LlamaCpp, top: int) -> None:
    prompt = await chat(engine, "What is the capital of France?")
    pieces = await run(engine, Job(prompt, 4, GREEDY, top_logprobs=top))
    found = [entry for piece in pieces for entry in piece.logprobs or []]
    assert "".join(entry.token for entry in found) == text(pieces) == "The capital of France"
    for entry in found:
        assert entry.logprob <= 0
        assert bytes(entry.bytes_).decode() == entry.token
        assert len(entry.top) == top
        assert entry.top == sorted(entry.top, key=lambda t: -t.logprob)
    if top:
        assert found[0].top[0].token == "The"
    plain = await run(engine, Job(prompt, 1, GREEDY))
    assert [piece.logprobs for piece in plain] == [None, None]


@pytest.mark.embedded
async def test_schema_is_enforced(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "Who are you?")
    pieces = await run(engine, Job(prompt, 60, GREEDY, grammar=Json(NAME)))
    assert set(json.loads(text(pieces))) == {"name"}
    assert pieces[-1].finish == "stop"
    constant = await run(engine, Job(prompt, 60, GREEDY, grammar=Json({"const": {"a": [1, None]}})))
    assert text(constant) == '{"a": [1, null]}'


@pytest.mark.embedded
@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"not": {}}, {"allOf": [{"type": "string"}, {"type": "null"}]}]
)
async def test_schema_that_the_engine_does_not_know(engine: LlamaCpp, schema: dict[str, object]) -> None:
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="can't be enforced"):
            await run(engine, Job([1, 2, 3], 5, grammar=Json(schema)))


@pytest.mark.embedded
async def test_what_it_refuses(engine: LlamaCpp) -> None:
    with pytest.raises(ContextTooLong) as caught:
        await run(engine, Job([260] * 1500, 4))
    assert (caught.value.tokens, caught.value.limit) == (1500, 1024)
    with pytest.raises(InvalidRequest, match="invalid tokens"):
        await run(engine, Job([10**6], 4))
    with pytest.raises(InvalidRequest, match="embeddings"):
        await engine.embed([[1, 2]])


@pytest.mark.embedded
async def test_leaving_in_the_stream_frees_the_slot(engine: LlamaCpp, engine_endpoint: Endpoint) -> None:
    job = Job(await chat(engine, "Tell me a story."), 900, ENDLESS)
    async with aclosing(engine.stream(job)) as stream:
        await stream.__anext__()
        await slots_within(engine_endpoint, 1, 5.0)
    await slots_within(engine_endpoint, 0, 5.0)


@pytest.mark.embedded
async def test_leaving_in_the_prompt_frees_the_slot(engine: LlamaCpp, engine_endpoint: Endpoint) -> None:
    """Once in time is enough: a busy machine may take a second for one step of the engine."""
    clock = asyncio.get_running_loop().time
    for attempt in range(20):
        task = asyncio.ensure_future(run(engine, Job([300 + 7 * i + attempt for i in range(1000)], 4)))
        while not task.done() and await busy(engine_endpoint) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        began = clock()
        if task.cancel():
            await slots_within(engine_endpoint, 0, 10.0)
            took = clock() - began
            with pytest.raises(asyncio.CancelledError):
                await task
            if took < 1.0:
                return
    raise AssertionError("it was never free within a second")


@pytest.mark.embedded
async def test_questions_are_answered_while_all_slots_work(engine: LlamaCpp) -> None:
    prompt = await chat(engine, "Tell me a story.")
    tasks = [asyncio.ensure_future(run(engine, Job([*prompt, 300 + i], 900, ENDLESS))) for i in range(16)]
    await asyncio.sleep(0)
    assert await asyncio.wait_for(engine.tokenize("Hello", special=False), 30) != []
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


@pytest.mark.embedded
async def test_managed_engine_serves_embeds_and_survives_a_kill(
    model_path: Path, socket_path: Path, tmp_path: Path
) -> None:
    settings = EngineSettings(kind="llamacpp", batch_size=2, context=256, embedding=True)
    lifeline = Lifeline()
    process = managed(
        settings,
        model=str(model_path),
        endpoint=listening_place(settings, socket_path),
        log=tmp_path / "logs" / "e.log",
        lifeline=lifeline,
    )
    process.start()
    try:
        await process.until("ready", "failed")
        assert process.info is not None, process.detail
        assert (process.info.context, process.info.slots) == (256, 2)
        assert socket_path.parent.stat().st_mode & 0o777 == 0o700
        engine = LlamaCpp(Endpoint(uds=str(socket_path)))
        first, second = await engine.embed([[300, 400], [500]])
        assert len(first) == len(second) == 576
        assert sum(x * x for x in first) == pytest.approx(1.0, abs=1e-3)

        stream = engine.stream(Job([300], 200, ENDLESS))
        await stream.__anext__()
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        with pytest.raises(EngineFailed):
            async for _ in stream:
                pass
        with pytest.raises(EngineUnavailable):
            await run(engine, Job([300], 1))
        await process.until("backoff")
        await process.until("ready")
        assert (await run(engine, Job([300], 1)))[-1].completion_tokens == 1
        await engine.close()
    finally:
        await process.stop()
        lifeline.close()
    assert process.state == "stopped"


async def test_broken_model_fails_at_once(socket_path: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"hello")
    lifeline = Lifeline()
    settings = EngineSettings(kind="llamacpp")
    place = listening_place(settings, socket_path)
    process = managed(settings, model=str(model), endpoint=place, log=tmp_path / "e.log", lifeline=lifeline)
    process.start()
    await process.until("failed")
    assert process.detail.splitlines()[-1].startswith(f"{model} is not a readable GGUF file")
    await process.stop()
    lifeline.close()


def test_socket_path_too_long(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="too long for a socket"):
        listening_place(EngineSettings(kind="llamacpp"), tmp_path / ("x" * 110) / "e.sock")


# A scripted one

TOKEN = b'data: {"content":"a","tokens":[5],"stop":false,"tokens_predicted":1,"tokens_evaluated":1}\n\n'
LOADING = b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}'


@asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[LlamaCpp]:
    async with HttpServer(script) as server:
        engine = LlamaCpp(server.endpoint)
        yield engine
        await engine.close()


@pytest.mark.parametrize(
    ("response", "error", "words"),
    [
        (chunked(TOKEN), EngineFailed, "before it was complete"),
        (chunked(TOKEN, end=False), EngineFailed, "broke off"),
        (chunked(TOKEN, b"data: nonsense\n\n"), EngineFailed, "can't be understood"),
        (chunked(TOKEN, b'data: {"error":{"code":500,"message":"boom"}}\n\n'), EngineFailed, "boom"),
        (ok(LOADING, status="503 Service Unavailable"), EngineUnavailable, "Loading model"),
        (ok(b"<html>", status="500 Oops"), EngineFailed, "<html>"),
        (ok(b"<html>", status="404 Not Found"), EngineFailed, "<html>"),
    ],
)
async def test_engine_that_breaks(response: bytes, error: type[ApiError], words: str) -> None:
    async def script(peer: object) -> None:
        await peer.request()  # type: ignore[attr-defined]
        await peer.send(response)  # type: ignore[attr-defined]

    async with scripted(script) as engine:
        with pytest.raises(error, match=words) as caught:
            await run(engine, Job([1], 1))
    assert (caught.value.retry_after is not None) == (error is EngineUnavailable)


async def test_all_that_one_read_brought_comes_at_once() -> None:
    last = TOKEN.replace(b'"stop":false', b'"stop":true,"stop_type":"eos"')
    async with scripted(answering(chunked(TOKEN * 3 + last))) as engine:
        lists = [pieces async for pieces in engine.stream(Job([1], 4))]
    assert [len(pieces) for pieces in lists] == [4]


async def test_ready_needs_a_token() -> None:
    async def script(peer: object) -> None:
        answers = {
            "/props": b'{"default_generation_settings":{"n_ctx":16},"total_slots":1}',
            "/tokenize": b'{"tokens":[5]}',
        }
        while request := await peer.request():  # type: ignore[attr-defined]
            done = chunked(b'data: {"stop":true,"stop_type":"eos"}\n\n')
            body = answers.get(request.path)
            await peer.send(done if body is None else ok(body))  # type: ignore[attr-defined]

    async with scripted(script) as engine:
        with pytest.raises(EngineFailed, match="generates nothing"):
            await ready(engine)
