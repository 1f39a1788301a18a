"""The path of an answer on an engine that says what the test tells it to: DeepSeek's formats, end to end."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import pytest

from deepseek_api_compat.config import ModelSettings
from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.errors import ContextTooLong
from deepseek_api_compat.gateway.chat import ChatService
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.gateway.templates import Templates
from deepseek_api_compat.protocol.completion import ChatCollector, ChatStream
from deepseek_api_compat.protocol.job import Job, Piece, TokenLogprob
from deepseek_api_compat.protocol.openai import ChatRequest
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.security.keys import Principal

CONTROLS = {
    "<｜begin▁of▁sentence｜>": 0,
    "<｜User｜>": 128803,
    "<｜Assistant｜>": 128804,
    "<think>": 128798,
    "</think>": 128799,
    "<｜tool▁calls▁begin｜>": 128806,
    "<｜tool▁calls▁end｜>": 128807,
    "<｜tool▁call▁begin｜>": 128808,
    "<｜tool▁call▁end｜>": 128809,
    "<｜tool▁sep｜>": 128814,
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL_V31 = (
    "Let me look.<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>"
    '{"city": "東京"}<｜tool▁call▁end｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}'
    "<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)


class ScriptedPool:
    """Looks like a model's pool; every job gets the script, `size` characters a token."""

    def __init__(self, format: str, script: str, size: int = 2, context: int = 4096) -> None:
        self.settings = ModelSettings(name="m")
        self.name = "m"
        self.jobs: list[Job] = []
        self.closed = 0
        self._format = format
        self._script = script
        self._size = size
        self._info = ModelInfo(context=context, slots=1, controls=CONTROLS, format=format)

    async def info(self) -> ModelInfo:
        return self._info

    def format(self, info: ModelInfo) -> str:
        return self._format

    async def ask(self, question: Callable[[ScriptedPool], Awaitable[list[int]]]) -> list[int]:
        return await question(self)

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        return [number for number, _ in enumerate("".join(segment.text for segment in segments))]

    async def stream(
        self, job: Job, key: int, on_lease: Callable[[int], Awaitable[None]]
    ) -> AsyncGenerator[list[Piece], None]:
        await on_lease(0)
        self.jobs.append(job)
        pieces = [self._script[at : at + self._size] for at in range(0, len(self._script), self._size)]
        try:
            for number, text in enumerate(pieces):
                logprobs = None
                if job.top_logprobs is not None:
                    logprobs = [TokenLogprob(text, -0.5, list(text.encode()))]
                yield [Piece([number], text, logprobs)]
            yield [
                Piece(
                    finish="stop",
                    prompt_tokens=len(job.prompt_ids),
                    completion_tokens=len(pieces),
                    cached_tokens=3,
                )
            ]
        finally:
            self.closed += 1


class Account:
    """The account of a request that nobody pays for."""

    def __init__(self) -> None:
        self.tally = Tally("/chat/completions", 0.0)
        self.principal = Principal(id="k", name="k", role="user", index=0)
        self.reserved: list[tuple[int, int | None, int]] = []
        self.replicas: list[int] = []

    def limit(self, wanted: int | None) -> int | None:
        return wanted

    async def reserve(self, pool: object, prompt: int, limit: int | None, answers: int) -> None:
        self.reserved.append((prompt, limit, answers))

    async def dispatch(self, replica: int) -> None:
        self.replicas.append(replica)

    def progress(self) -> None:
        pass


async def ask(pool: ScriptedPool, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The whole answer, and the chunks of the same events streamed."""
    base = {"model": "m", "messages": [{"role": "user", "content": "Weather?"}]}
    request = msgspec.convert(base | fields, ChatRequest)
    service = ChatService(Templates(), max_choices=8)
    whole = ChatCollector("id", 0, "m", n=request.choices)
    stream = ChatStream("id", 0, "m", n=request.choices, include_usage=True)
    sent = b""
    async with aclosing(service.chat(pool, request, None, Account())) as events:  # type: ignore[arg-type]
        async for group in events:
            whole.feed(group)
            sent += stream.feed(group)
    chunks = [json.loads(block[6:]) for block in (sent + stream.done()).split(b"\n\n")[:-2]]
    return json.loads(whole.response()), chunks


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
async def test_parallel_calls_of_v31(size: int) -> None:
    pool = ScriptedPool("v3.1", CALL_V31, size)
    answer, chunks = await ask(pool, tools=[TOOL])
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Let me look."
    calls = [call["function"] for call in choice["message"]["tool_calls"]]
    assert [json.loads(call["arguments"])["city"] for call in calls] == ["東京", "Paris"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    begun = [call for delta in deltas for call in delta.get("tool_calls", ()) if "id" in call]
    assert [call["index"] for call in begun] == [0, 1]
    assert len({call["id"] for call in begun}) == 2
    assert "<｜tool▁sep｜>" in pool.jobs[0].markers


async def test_markup_of_undeclared_tools_is_text() -> None:
    answer, _ = await ask(ScriptedPool("v3.1", CALL_V31))
    assert answer["choices"][0]["message"]["content"] == CALL_V31
    assert answer["choices"][0]["finish_reason"] == "stop"


async def test_reasoning_is_apart_and_counted() -> None:
    answer, chunks = await ask(ScriptedPool("v3.1", "Hmmmm.</think>Rain.", 1), thinking=True)
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hmmmm.", "Rain.")
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("Hmmmm.</think>")
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
    assert chunks[-1]["usage"] == answer["usage"]


async def test_a_stop_string_ends_the_text_not_the_thought() -> None:
    pool = ScriptedPool("v3.1", "First.\n\nSecond.</think>Rain.\n\nMore.", 3)
    answer, _ = await ask(pool, thinking=True, stop="\n\n")
    message = answer["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("First.\n\nSecond.", "Rain.")
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert pool.jobs[0].stop == ()
    assert pool.closed == 1


async def test_plain_text_leaves_stop_strings_to_the_engine() -> None:
    pool = ScriptedPool("v3.1", "Rain.")
    await ask(pool, stop=["\n\n"])
    assert pool.jobs[0].stop == ("\n\n",)


async def test_logprobs_are_those_of_the_text() -> None:
    answer, _ = await ask(ScriptedPool("v3.1", "Hm.</think>Rain", 1), thinking=True, logprobs=True)
    tokens = [token["token"] for token in answer["choices"][0]["logprobs"]["content"]]
    assert tokens == ["R", "a", "i", "n"]


async def test_several_choices_have_calls_of_their_own() -> None:
    answer, _ = await ask(ScriptedPool("v3.1", CALL_V31), tools=[TOOL], n=3)
    ids = [call["id"] for choice in answer["choices"] for call in choice["message"]["tool_calls"]]
    assert len(set(ids)) == 6
    assert answer["usage"]["completion_tokens"] == 3 * -(-len(CALL_V31) // 2)


async def test_forced_calls_have_a_grammar() -> None:
    pool = ScriptedPool("v3.1", CALL_V31)
    await ask(pool, tools=[TOOL], tool_choice="required")
    assert pool.jobs[0].grammar is not None
    await ask(pool, tools=[TOOL])
    assert pool.jobs[1].grammar is None


async def test_the_context_error_has_both_numbers() -> None:
    with pytest.raises(ContextTooLong, match=r"100 tokens.* 2\d\d\d tokens"):
        await ask(ScriptedPool("v3", "x", context=100), messages=[{"role": "user", "content": "a" * 2500}])


async def test_keys_share_no_prefixes_where_they_must_not() -> None:
    pool = ScriptedPool("v3", "Rain.")
    await ask(pool)
    assert pool.jobs[0].cache_salt == ""
    pool.settings = ModelSettings(name="m", isolate_cache=True)
    await ask(pool)
    assert pool.jobs[1].cache_salt
