"""`deepseek-api parse`: raw DeepSeek outputs as messages, a JSON line for each line of standard input."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import msgspec

from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.events import Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]


class _Line(msgspec.Struct):
    format: str
    output: str
    start: str
    tools_declared: bool
    engine_finish: str
    tools: list[str] = []
    chunks: list[str] | None = None


def add_parser(subparsers: Subparsers) -> None:
    """Add `parse`; it sets `run`, a function from the arguments to the exit code."""
    command = subparsers.add_parser(
        "parse",
        help="turn raw DeepSeek outputs into messages (JSON lines)",
        description="Read JSON lines with format, output, start, tools_declared, tools, engine_finish and "
        "chunks from standard input; write a message, or an error, for each.",
    )
    command.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    for line in sys.stdin.buffer:
        if line.strip():
            sys.stdout.buffer.write(msgspec.json.encode(_answer(line)) + b"\n")
            sys.stdout.buffer.flush()
    return 0


def _answer(line: bytes) -> dict[str, Any]:
    try:
        given = msgspec.json.decode(line, type=_Line)
        return message(given)
    except (msgspec.MsgspecError, ValueError) as error:
        return {"error": {"message": str(error), "type": "invalid_request_error"}}


def message(given: _Line) -> dict[str, Any]:
    """The message that one output becomes. Raises ValueError for an unknown format or start."""
    parser = output.parser(
        given.format, start=given.start, tools_declared=given.tools_declared, tools=given.tools
    )
    pieces = [Piece(text=text) for text in given.chunks or [given.output]]
    events = [event for piece in [*pieces, Piece(finish=given.engine_finish)] for event in parser.feed(piece)]
    content = reasoning = finish_reason = ""
    calls: list[dict[str, Any]] = []
    for event in [*events, *parser.close()]:
        if isinstance(event, Text):
            content += event.text
        elif isinstance(event, Reasoning):
            reasoning += event.text
        elif isinstance(event, Finish):
            finish_reason = event.reason
        elif isinstance(event, ToolCall):
            if event.id is not None:
                function = {"name": event.name, "arguments": ""}
                calls.append({"id": event.id, "type": "function", "function": function})
            calls[event.call_index]["function"]["arguments"] += event.arguments
    return {
        "content": content or None,
        "reasoning_content": reasoning or None,
        "tool_calls": calls,
        "finish_reason": finish_reason,
    }
