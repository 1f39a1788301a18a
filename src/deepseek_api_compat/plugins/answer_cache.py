"""Response cache: the same request with temperature 0 has the answer that it had before.

Failure policy: a file that is broken, full or locked means no cache, for a minute; the log says so. Requests
go on. When the same request comes twice at the same time, both are computed.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import sqlite3
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from deepseek_api_compat.plugins import (
    Context,
    Event,
    Finish,
    Outcome,
    Reasoning,
    Refuse,
    Reply,
    Text,
    ToolCall,
    Usage,
)
from deepseek_api_compat.plugins.answer_store import AnswerStore

VERSION = 1  # of what is kept; answers of another one are never found
RESTS = 60.0  # seconds without cache after a failure
# How the answer is sent says nothing about what it is; the temperature is 0, however that is written.
APART = frozenset({"stream", "stream_options", "temperature"})
COMPLETE = frozenset({"stop", "tool_calls"})
_EVENTS: dict[str, Any] = {each.__name__: each for each in (Text, Reasoning, ToolCall, Finish, Usage)}

log = logging.getLogger("deepseek_api.plugins")


class AnswerCache:
    """ttl: seconds that an answer is kept. max_bytes: of all answers. shared: one cache for all keys."""

    name = "answer-cache"
    on_error = "skip"
    quick = True

    def __init__(
        self,
        ttl: float = 3600.0,
        max_entries: int = 10_000,
        max_bytes: int = 256 << 20,
        shared: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Raises ValueError for bounds that leave no room."""
        if not (ttl > 0 and max_entries > 0 and max_bytes > 0):
            raise ValueError("ttl, max_entries and max_bytes must be above 0")
        self._store = AnswerStore(ttl, max_entries, max_bytes, clock)
        self._shared = shared
        self._clock = clock
        self._rests_until = 0.0

    def pre_process(self, request: dict[str, Any], context: Context) -> dict[str, Any] | Reply:
        wish = _wish(request.pop("cache", None))
        if request.get("temperature") != 0 or not _same_tomorrow(request["messages"]):
            return request
        key = self._key(request, context)
        if not wish.get("no-cache"):
            kept = self._tried(lambda: self._store.get(context.data_dir, key))
            if kept is not None and (events := _decoded(kept)):
                log.debug(
                    "Answered from the cache.",
                    extra={"fields": {"request_id": context.request_id, "model": context.model}},
                )
                return Reply(events)
        if not wish.get("no-store"):
            context.state.update(key=key, events=[], choices=request.get("n") or 1)
        return request

    def on_event(self, event: Event, context: Context) -> None:
        if "key" in context.state:
            context.state["events"].append(event)

    def post_process(self, outcome: Outcome, context: Context) -> None:
        if "key" not in context.state or outcome.status != 200 or outcome.error_code is not None:
            return
        events: list[Event] = context.state["events"]
        ends = [event.reason for event in events if isinstance(event, Finish)]
        if len(ends) != context.state["choices"] or not COMPLETE.issuperset(ends):
            return
        usage = Usage(
            outcome.prompt_tokens, outcome.cached_tokens, outcome.completion_tokens, outcome.reasoning_tokens
        )
        answer = _encoded([*_joined(events), usage])
        self._tried(lambda: self._store.put(context.data_dir, context.state["key"], answer))

    def close(self) -> None:
        self._store.close()

    def _key(self, request: dict[str, Any], context: Context) -> bytes:
        # The order of fields further down may be seen in the prompt (a tool's JSON Schema), so it counts.
        asked = sorted(
            (name, value) for name, value in request.items() if name not in APART and value is not None
        )
        whose = None if self._shared else context.key_id
        return hashlib.sha256(msgspec.json.encode([VERSION, whose, context.model, asked])).digest()

    def _tried(self, call: Callable[[], bytes | None]) -> bytes | None:
        """What the store says; None also while it can't be used."""
        if self._clock() < self._rests_until:
            return None
        try:
            return call()
        except (sqlite3.Error, OSError) as error:
            self._rests_until = self._clock() + RESTS
            log.warning(
                "The response cache can't be used and rests for %g s: %s.", RESTS, type(error).__name__
            )
            self._store.close()
            return None


def _wish(given: Any) -> dict[str, bool]:
    """The request's field `cache`. Raises Refuse."""
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(
        name in ("no-cache", "no-store") and isinstance(value, bool) for name, value in given.items()
    ):
        raise Refuse(
            "`cache` must be an object with `no-cache` or `no-store`, true or false.",
            code="invalid_value",
            param="cache",
        )
    return given


def _same_tomorrow(value: Any) -> bool:
    """Whether messages have all that they are about in them: what an address leads to may change."""
    if isinstance(value, list):
        return all(map(_same_tomorrow, value))
    if not isinstance(value, dict):
        return True
    for url in (value.get("url"), value.get("image_url")):
        if isinstance(url, str) and not url.startswith("data:"):
            return False
    return all(_same_tomorrow(part) for part in value.values())


def _joined(events: Iterable[Event]) -> list[Event]:
    """The same answer in few events, choice by choice."""

    def place(event: Event) -> tuple[Any, ...]:
        assert not isinstance(event, Usage)
        return event.index, type(event), event.call_index if isinstance(event, ToolCall) else 0

    in_order = sorted((event for event in events if not isinstance(event, Usage)), key=lambda one: one.index)
    return [_one(list(group)) for _, group in itertools.groupby(in_order, place)]


def _one(events: Sequence[Event]) -> Event:
    """One event for neighbours of the same text."""
    first = events[0]
    if isinstance(first, Text):
        given = [event.logprobs for event in events if isinstance(event, Text) and event.logprobs is not None]
        return Text(first.index, _text(events), list(itertools.chain(*given)) if given else None)
    if isinstance(first, Reasoning):
        return Reasoning(first.index, _text(events))
    if isinstance(first, ToolCall):
        calls = [event for event in events if isinstance(event, ToolCall)]
        return ToolCall(
            first.index,
            first.call_index,
            next((call.id for call in calls if call.id), None),
            next((call.name for call in calls if call.name), None),
            "".join(call.arguments for call in calls),
        )
    return first


def _text(events: Iterable[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text | Reasoning))


def _encoded(events: Sequence[Event]) -> bytes:
    return msgspec.json.encode([(type(event).__name__, event) for event in events])


def _decoded(answer: bytes) -> list[Event] | None:
    """None for what is no answer."""
    try:
        kept = msgspec.json.decode(answer, type=list[tuple[str, msgspec.Raw]])
        return [msgspec.json.decode(raw, type=_EVENTS[name]) for name, raw in kept]
    except (msgspec.MsgspecError, KeyError):
        return None
