"""Calls and their results: every call of the history has one result, and the results come in its order."""

from __future__ import annotations

from collections.abc import Sequence

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import Message


def paired(messages: Sequence[Message]) -> list[Message]:
    """The messages, the results of parallel calls in the order of the calls.

    Models see no ids: they tell results apart by their order only. Raises InvalidRequest, as OpenAI does,
    for a result without a call right before it, a second result of a call, and a call without one.
    """
    ordered: list[Message] = []
    at = 0
    while at < len(messages):
        message = messages[at]
        if message.role == "tool":
            raise _problem(at, "tool_call_id", "answers no tool call of the message before")
        ordered.append(message)
        at += 1
        if message.role == "assistant" and message.tool_calls:
            ids = [call.id for call in message.tool_calls]
            results = _results(messages, at, ids)
            ordered += results
            at += len(results)
    return ordered


def _results(messages: Sequence[Message], at: int, ids: list[str]) -> list[Message]:
    """The results that begin at message `at`, sorted as `ids`."""
    found: dict[str, Message] = {}
    first = at
    while at < len(messages) and messages[at].role == "tool":
        id = messages[at].tool_call_id or ""
        if id not in ids:
            raise _problem(at, "tool_call_id", f"is {id[:100]!r}, which no call before it has")
        if id in found:
            raise _problem(at, "tool_call_id", f"is {id[:100]!r}, and that call has a result already")
        found[id] = messages[at]
        at += 1
    missing = [id for id in ids if id not in found]
    if missing:
        raise _problem(first - 1, "tool_calls", f"has calls without a result: {', '.join(missing)[:200]}")
    return [found[id] for id in dict.fromkeys(ids)]


def _problem(at: int, field: str, what: str) -> InvalidRequest:
    param = f"messages[{at}].{field}"
    return InvalidRequest(f"`{param}` {what}.", param=param)
