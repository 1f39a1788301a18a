"""`deepseek-api parse`: the messages that a model's raw outputs become, for debugging."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from deepseek_api_compat.cli.lines import answer_lines
from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.completion import ChatCollector
from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.output import Parser
from deepseek_api_compat.protocol.output_tags import TagParser

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

_TEMPLATE = "template"
_FORMATS = (*output.FORMATS, "v3-0324", _TEMPLATE)
_DESCRIPTION = """\
Reads JSON lines on standard input,
  {"format": "v3.1", "output": "...", "start": "content", "tools_declared": true, "engine_finish": "stop"}
where start says where the prompt left off, and writes one line for each:
  {"content", "reasoning_content", "tool_calls", "finish_reason"}, or {"error": {...}}.
With chunks, a list of strings, the output comes in these pieces; the answer must be the same."""


class Line(msgspec.Struct):
    """One output, and what was known when it was asked for."""

    format: str
    output: str
    start: Literal[
        "content", "reasoning", "either", "tool_calls", "content_continuation", "reasoning_continuation"
    ]
    tools_declared: bool
    engine_finish: Literal["stop", "length"]
    tools: list[str] | None = None
    chunks: list[str] | None = None


def add_parser(subparsers: Subparsers) -> None:
    """Add `parse`, which sets `run`, a function from the arguments to the exit code."""
    parser = subparsers.add_parser(
        "parse",
        help="show the messages that raw outputs become",
        description=_DESCRIPTION,
        epilog=f"formats: {', '.join(_FORMATS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run)


def _run(_: argparse.Namespace) -> int:
    return answer_lines(Line, message)


def message(given: Line) -> dict[str, Any]:
    """The message that an output becomes. Raises InvalidRequest for what its format doesn't know."""
    parser = _parser(given)
    collector = ChatCollector("", 0, "")
    for text in [given.output] if given.chunks is None else given.chunks:
        collector.feed(parser.feed(Piece(text=text)))
    collector.feed(parser.feed(Piece(finish=given.engine_finish)))
    collector.feed(parser.close())
    choice = msgspec.json.decode(collector.response())["choices"][0]
    answer = choice["message"]
    return {
        "content": answer["content"] or None,
        "reasoning_content": answer.get("reasoning_content"),
        "tool_calls": answer.get("tool_calls", []),
        "finish_reason": choice["finish_reason"],
    }


def _parser(given: Line) -> Parser:
    if given.format not in _FORMATS:
        known = ", ".join(_FORMATS)
        raise InvalidRequest(f"There is no format {given.format!r}; there are: {known}.", param="format")
    try:
        if given.format == _TEMPLATE:
            return TagParser(start=given.start, tools_declared=given.tools_declared)
        return output.parser(
            given.format.removesuffix("-0324"),
            start=given.start,
            tools_declared=given.tools_declared,
            tools=given.tools or [],
        )
    except ValueError as error:
        raise InvalidRequest(f"The format {given.format}: {error}", param="start") from None
