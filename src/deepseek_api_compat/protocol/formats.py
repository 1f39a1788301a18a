"""What a model's format decides: its prompts, which tokens its answers must show, and who reads them.

A format is one of DeepSeek's (see `deepseek`), `v3-0324`, or "template": the model's own chat template.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import msgspec

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol import deepseek
from deepseek_api_compat.protocol.deepseek import grammar, output
from deepseek_api_compat.protocol.deepseek import segments as deepseek_tokens
from deepseek_api_compat.protocol.deepseek.prompt_v3 import fill_in_the_middle
from deepseek_api_compat.protocol.grammar import CallSyntax
from deepseek_api_compat.protocol.openai import ChatRequest
from deepseek_api_compat.protocol.output import OutputParser, Parser
from deepseek_api_compat.protocol.output_tags import TagParser
from deepseek_api_compat.protocol.segment import Prompt, Segment

TEMPLATE = "template"
_DSML = "｜DSML｜"
# Control tokens that are markup of an answer; a model has some of them, or none.
_MARKERS = (
    deepseek_tokens.THINK,
    deepseek_tokens.THINK_END,
    deepseek_tokens.CALLS_BEGIN,
    deepseek_tokens.CALLS_END,
    deepseek_tokens.CALL_BEGIN,
    deepseek_tokens.CALL_END,
    deepseek_tokens.SEP,
    _DSML,
    "<tool_call>",
    "</tool_call>",
)


def prompt(format: str, request: ChatRequest, functions: Sequence[dict[str, Any]] | None) -> Prompt:
    """A request in one of DeepSeek's formats, as `deepseek.render`; raises what that raises."""
    name, _, variant = format.partition("-")
    if (
        name in ("v4", "v4.1")
        and request.thinks is None
        and request.tool_choice not in (None, "auto", "none")
    ):
        # They think unless told not to, and can't be made to call a tool then.
        request = msgspec.structs.replace(request, thinking=False)
    if name == "v3" and declared_tools(request):
        name, variant = "v3-tools", ""
    segments = deepseek.render(name, variant or None, request, functions)
    return Prompt(segments, _start(name, segments, request))


def _start(format: str, segments: Sequence[Segment], request: ChatRequest) -> str:
    """Where the prompt leaves the answer: the last control token before it says so."""
    special = [segment.text for segment in segments if segment.special]
    thinks = special[-1:] == [deepseek_tokens.THINK]
    if request.messages[-1].prefix:
        return "reasoning_continuation" if thinks else "content_continuation"
    if thinks:
        return "reasoning"
    if special[-1:] == [_DSML]:  # a forced call: the block is open
        return "tool_calls"
    # With tools R1 opens its reasoning itself, or goes on right after their results.
    return "either" if format == "r1" else "content"


def declared_tools(request: ChatRequest) -> bool:
    """May the answer have calls?"""
    return bool(request.tools) and request.tool_choice != "none"


def fill_in(prefix: str, suffix: str, controls: Collection[str]) -> list[Segment]:
    """The prompt for what is between two texts. Raises InvalidRequest where a model has no tokens for it."""
    segments = [segment for segment in fill_in_the_middle(prefix, suffix) if segment.text]
    if any(segment.special and segment.text not in controls for segment in segments):
        raise InvalidRequest("This model can't fill in the middle of a text.", param="suffix")
    return segments


def markers(controls: Collection[str]) -> tuple[str, ...]:
    """The control tokens that must show in the text of a chat answer."""
    return tuple(marker for marker in _MARKERS if marker in controls)


def call_syntax(format: str) -> CallSyntax:
    """How an answer writes its calls."""
    return grammar.syntax(format)


def parser(format: str, request: ChatRequest, start: str, index: int = 0) -> Parser:
    """Who reads one choice of the answer."""
    tools = declared_tools(request)
    if format != TEMPLATE:
        names = [tool.function.name for tool in request.tools or ()]
        name = "v3" if format == "v3-0324" else format
        return output.parser(name, start=start, tools_declared=tools, tools=names, index=index)
    if start in ("content", "content_continuation") and not tools:
        return OutputParser(index)
    return TagParser(start=start, tools_declared=tools, index=index)
