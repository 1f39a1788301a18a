"""Plugins behind a chat upstream: its answer read as events, and written again as they leave them.

Only where a plugin has `on_event`; otherwise an upstream's bytes are passed on as they are. What the upstream
says beyond our own answers' fields is lost on the way.
"""

from __future__ import annotations

from typing import Any

import msgspec

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.gateway.account import Account
from deepseek_api_compat.gateway.plugins import Run
from deepseek_api_compat.gateway.response import Sink
from deepseek_api_compat.protocol.completion import ChatCollector, ChatStream
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.protocol.job import TokenLogprob


class _Function(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class _Call(msgspec.Struct):
    index: int | None = None
    id: str | None = None
    function: _Function = msgspec.field(default_factory=_Function)


class _Alternative(msgspec.Struct):
    token: str = ""
    logprob: float = 0.0
    bytes: list[int] | None = None


class _Logprob(_Alternative):
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Logprob] | None = None


class _Said(msgspec.Struct):
    """A message, or a part of one."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None


class _Choice(msgspec.Struct):
    index: int = 0
    delta: _Said | None = None
    message: _Said | None = None
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Reasoned(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Counts(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_cache_hit_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None
    completion_tokens_details: _Reasoned | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Counts | None = None


_answer = msgspec.json.Decoder(_Answer)


class Watched:
    """Stands before the response to one request to a chat upstream."""

    def __init__(self, out: Sink, run: Run, writer: ChatStream | ChatCollector, account: Account) -> None:
        """`out` is where it goes; `writer` makes it of events."""
        self._to = out
        self._run = run
        self._writer = writer
        self._account = account
        self.written = False  # as soon as a plugin has seen any of it: no other answer may begin then

    async def write(self, data: bytes) -> None:
        self.written = True
        assert isinstance(self._writer, ChatStream)
        if made := await self._seen(data):
            self._account.writing()
            await self._to.write(made)

    async def finish(self, data: bytes) -> None:
        self.written = True
        if isinstance(self._writer, ChatStream):
            made = await self._seen(data)
            await self._to.finish(made + self._writer.done())
            return
        self._writer.feed(await self._run.passed(_events_of(data)))
        await self._to.finish(self._writer.response())

    async def _seen(self, data: bytes) -> bytes:
        """What whole server-sent events become."""
        assert isinstance(self._writer, ChatStream)
        events: list[Event] = []
        for event in data.split(b"\n\n"):
            if event.startswith(b"data:") and not event[5:].lstrip().startswith(b"[DONE]"):
                events += _events_of(event[5:])
        if not events:
            return b""
        if isinstance(last := events[-1], Finish) and last.index == 0:
            self._account.tally.finish = last.reason
        return self._writer.feed(await self._run.passed(events))


def _events_of(answer: bytes) -> list[Event]:
    """The events that a completion, or a chunk of one, is. Raises EngineFailed."""
    try:
        read = _answer.decode(answer)
    except msgspec.MsgspecError:
        raise EngineFailed("The upstream answered something that is not a completion.") from None
    events: list[Event] = []
    for choice in read.choices:
        index = choice.index
        said = choice.delta or choice.message or _Said()
        if said.reasoning_content:
            events.append(Reasoning(index, said.reasoning_content))
        logprobs = _logprobs(choice.logprobs)
        if said.content or logprobs:
            events.append(Text(index, said.content or "", logprobs))
        for number, call in enumerate(said.tool_calls or ()):
            at = number if call.index is None else call.index
            events.append(ToolCall(index, at, call.id, call.function.name, call.function.arguments or ""))
        if choice.finish_reason:
            events.append(Finish(index, choice.finish_reason))
    if (usage := read.usage) is not None:
        details, reasoned = usage.prompt_tokens_details, usage.completion_tokens_details
        cached = details.cached_tokens if details else usage.prompt_cache_hit_tokens
        events.append(
            Usage(
                usage.prompt_tokens,
                cached or 0,
                usage.completion_tokens,
                (reasoned and reasoned.reasoning_tokens) or 0,
            )
        )
    return events


def _logprobs(given: _Logprobs | None) -> list[TokenLogprob] | None:
    if given is None or given.content is None:
        return None
    return [_token(one, [_token(other) for other in one.top_logprobs or ()]) for one in given.content]


def _token(given: _Alternative, top: Any = ()) -> TokenLogprob:
    bytes_ = list(given.token.encode()) if given.bytes is None else given.bytes
    return TokenLogprob(given.token, given.logprob, bytes_, list(top))
