"""What the tests of output parsers share: run one, and add its events up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count
from typing import Any

from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.output import Parser


def parser_of(format: str, start: str = "content", tools_declared: bool = True) -> Parser:
    """A parser whose calls are `call_0`, `call_1` and so on."""
    ids = count()
    return output.parser(
        format, start=start, tools_declared=tools_declared, tools=[], new_id=lambda: f"call_{next(ids)}"
    )


def events_of(parser: Parser, chunks: Iterable[str], finish: str = "stop") -> list[Event]:
    pieces = [*(Piece(text=chunk) for chunk in chunks), Piece(finish=finish)]
    return [event for piece in pieces for event in parser.feed(piece)] + parser.close()


def add_up(events: Sequence[Event]) -> dict[str, Any]:
    """The message, as the golden vectors write it; what OpenAI's rules for streams ask for is checked."""
    calls: list[dict[str, str]] = []
    for event in events:
        if isinstance(event, ToolCall):
            if event.call_index == len(calls):
                assert event.id == f"call_{event.call_index}"
                assert event.name
                calls.append({"name": event.name, "arguments": ""})
            else:
                assert event.call_index == len(calls) - 1
                assert event.id is None
                assert event.name is None
            calls[-1]["arguments"] += event.arguments
    assert [isinstance(event, Finish) for event in events].index(True) == len(events) - 1
    assert isinstance(events[-1], Finish)
    return {
        "content": "".join(event.text for event in events if isinstance(event, Text)),
        "reasoning_content": "".join(event.text for event in events if isinstance(event, Reasoning)),
        "tool_calls": calls,
        "finish_reason": events[-1].reason,
    }


def in_order(events: Sequence[Event]) -> list[tuple[str, str]]:
    """Kind and text of each stretch of events of one kind: what every split must have in common."""
    stretches: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCall):
            kind, text = (
                f"call {event.call_index}",
                (f"{event.name}: " if event.name else "") + event.arguments,
            )
        elif isinstance(event, Text | Reasoning):
            kind, text = type(event).__name__, event.text
        elif isinstance(event, Finish):
            kind, text = "Finish", event.reason
        if stretches and stretches[-1][0] == kind:
            stretches[-1] = (kind, stretches[-1][1] + text)
        elif text:
            stretches.append((kind, text))
    return stretches


def cut(text: str, places: Iterable[int]) -> list[str]:
    places = sorted(places)
    return [text[i:j] for i, j in zip([0, *places], [*places, len(text)], strict=True)]
