"""What an answer may look like: a small grammar that every engine's own syntax can say, and who asks for it.

`constraint` makes it from a request. How a call is written differs from format to format: that is a
`CallSyntax`; `GenericCalls` is the one of models with a template of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeAlias

import msgspec

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.json_schema import Schema, enforceable
from deepseek_api_compat.protocol.openai import ChatRequest, NamedToolChoice, Tool
from deepseek_api_compat.protocol.regular import Expr
from deepseek_api_compat.protocol.segment import Segment

MOST_CALLS = 32  # in one answer
ANY_OBJECT: Schema = {"type": "object"}
NOTHING: Schema = {"type": "object", "properties": {}, "additionalProperties": False}
THINK = (Segment("<think>", True),)
THINK_END = (Segment("</think>", True),)

# What a name in a tag or a header can't have; OpenAI allows letters, digits, _ and - only.
_UNSPEAKABLE = re.compile(r'[<>"\\\s\x00-\x1f｜]')


class Exactly(msgspec.Struct, frozen=True):
    """This text. A special segment is its control token; text, where the model has no such token."""

    segments: tuple[Segment, ...]


class Json(msgspec.Struct, frozen=True):
    """A JSON text that matches the schema (as `enforceable` returns it), on one line.

    root: what the schema's references point into, where it is not the schema itself.
    """

    schema: Schema
    root: Schema | None = None


class Pattern(msgspec.Struct, frozen=True):
    """A text that all these expressions match, and none of `but`."""

    matches: tuple[Expr, ...]
    but: tuple[Expr, ...] = ()


class Free(msgspec.Struct, frozen=True):
    """Any text, empty too, in which none of the spellings of `without` occurs.

    after: the end of a text that it goes on with, in which a spelling may have begun.
    """

    without: tuple[str, ...] = ()
    after: str = ""


class Until(msgspec.Struct, frozen=True):
    """Any text as of `Free`, and right after it the marker: it ends where the marker first comes.

    after: as of `Free`; the marker may have begun in it too.
    """

    marker: tuple[Segment, ...]
    without: tuple[str, ...] = ()
    after: str = ""


class Seq(msgspec.Struct, frozen=True):
    """One after another."""

    parts: tuple[Grammar, ...]


class OneOf(msgspec.Struct, frozen=True):
    """One of them."""

    options: tuple[Grammar, ...]


class Repeat(msgspec.Struct, frozen=True):
    """`item`, from `least` to `most` times (None: any number)."""

    item: Grammar
    most: int | None = None
    least: int = 0


Grammar: TypeAlias = Exactly | Json | Pattern | Free | Until | Seq | OneOf | Repeat


class Function(NamedTuple):
    """A function that may be called; its schema as `enforceable` returns it."""

    name: str
    schema: Schema


class CallSyntax(Protocol):
    """How a format writes calls; `between` is one call's end, or nothing, and what comes before the next one.

    lead:     framing in front of a block of calls that begins the answer
    opening:  begins a block: the first text or token that can only be a call
    reserved: spellings that free text must not have, for the parser would read them as markup
    in_thoughts: those of them that are markup in reasoning too
    usual:    most calls that are forced, where the request does not ask for parallel ones
    """

    @property
    def lead(self) -> tuple[Segment, ...]: ...
    @property
    def opening(self) -> tuple[Segment, ...]: ...
    @property
    def between(self) -> tuple[Segment, ...]: ...
    @property
    def closing(self) -> tuple[Segment, ...]: ...
    @property
    def reserved(self) -> tuple[str, ...]: ...
    @property
    def in_thoughts(self) -> tuple[str, ...]: ...
    @property
    def usual(self) -> int: ...

    def call(self, function: Function) -> Grammar: ...


class GenericCalls:
    """`<tool_call>`, a JSON object with name and arguments, `</tool_call>`, each on a line of its own."""

    lead: tuple[Segment, ...] = ()
    # Control tokens for some models, text for most.
    opening = (Segment("<tool_call>", True), Segment("\n", False))
    closing = (Segment("\n", False), Segment("</tool_call>", True))
    between = (*closing, Segment("\n", False), *opening)
    reserved = ("<tool_call>",)
    in_thoughts: tuple[str, ...] = ()
    usual = 1  # a model that was not trained for calls repeats the first one till it runs out of room

    def call(self, function: Function) -> Grammar:
        head = f'{{"name": {json.dumps(function.name, ensure_ascii=False)}, "arguments": '
        return Seq((text(head), Json(function.schema), text("}")))


def text(written: str) -> Exactly:
    return Exactly((Segment(written, False),))


def one_of(options: Sequence[Grammar]) -> Grammar:
    return options[0] if len(options) == 1 else OneOf(tuple(options))


def constraint(request: ChatRequest, syntax: CallSyntax, start: str) -> Grammar | None:
    """What the answer must look like; None for free text. `start` is the prompt's (see `Prompt`).

    Forced calls (`tool_choice`) match their tool's schema, and so do calls of tools that are `strict`; a
    `response_format` is the whole answer, unless tools are declared and the model calls one instead. What is
    thought before is free. Raises InvalidRequest for a schema that can't be enforced, naming the keyword, and
    for a choice of tools that are not there.
    """
    answer = _answer(request, syntax, start)
    if answer is None:
        return None
    thought = Until(THINK_END, (THINK_END[0].text, *syntax.in_thoughts))
    if start.startswith("reasoning"):
        return Seq((thought, answer))
    if start == "either":
        return OneOf((Seq((Exactly(THINK), thought, answer)), answer))
    return answer


def _answer(request: ChatRequest, syntax: CallSyntax, start: str) -> Grammar | None:
    choice, tools, opened = request.tool_choice, request.tools or [], start == "tool_calls"
    most = 1 if request.parallel_tool_calls is False else MOST_CALLS
    if isinstance(choice, NamedToolChoice):
        tool = _named(tools, choice.function.name)
        return _block(syntax, [_function(*tool)], 1, opened=opened, lead=True)
    if choice == "required":
        if not tools:
            raise InvalidRequest("`tool_choice` is `required`, but `tools` has none.", param="tool_choice")
        functions = [_function(i, tool) for i, tool in enumerate(tools)]
        most = most if request.parallel_tool_calls else min(most, syntax.usual)
        return _block(syntax, functions, most, opened=opened, lead=True)
    functions = [] if choice == "none" else [_optional(i, tool) for i, tool in enumerate(tools)]
    schema = _wanted(request, start)
    if schema is not None:
        options: list[Grammar] = [Json(schema)]
        if functions:
            options.append(_block(syntax, functions, most, lead=True))
        return one_of(options)
    if functions and any(tool.function.strict for tool in tools):
        free = Free(syntax.reserved)
        return OneOf((free, _block(syntax, functions, most, lead=False)))
    return None


def _block(
    syntax: CallSyntax, functions: Sequence[Function], most: int, *, lead: bool, opened: bool = False
) -> Grammar:
    """Calls from the block's marker to its end; `lead`: the marker comes at once, else after free text."""
    call = one_of([syntax.call(function) for function in functions])
    further = Repeat(Seq((Exactly(syntax.between), call)), most - 1)
    if opened:
        opening: tuple[Grammar, ...] = ()
    elif lead:
        opening = (Exactly(syntax.lead + syntax.opening),)
    else:
        opening = (Until(syntax.opening, syntax.reserved),)
    return Seq((*opening, call, *([] if most == 1 else [further]), Exactly(syntax.closing)))


def _named(tools: Sequence[Tool], name: str) -> tuple[int, Tool]:
    for i, tool in enumerate(tools):
        if tool.function.name == name:
            return i, tool
    raise InvalidRequest(
        f"`tool_choice` names the function {name[:100]!r}, which is not in `tools`.", param="tool_choice"
    )


def _function(i: int, tool: Tool) -> Function:
    """The i-th tool with its schema."""
    param = f"tools[{i}].function"
    _check_name(tool.function.name, f"{param}.name")
    parameters = tool.function.parameters
    if parameters is None:
        return Function(tool.function.name, NOTHING)
    if parameters.get("type", "object") != "object":
        raise InvalidRequest(f"`{param}.parameters.type` must be `object`.", param=f"{param}.parameters.type")
    if "$ref" not in parameters:
        parameters = {"type": "object", **parameters}
    return Function(tool.function.name, enforceable(parameters, f"{param}.parameters"))


def _optional(i: int, tool: Tool) -> Function:
    """A tool that the model may call or not: its schema counts only if it is strict."""
    if tool.function.strict:
        return _function(i, tool)
    _check_name(tool.function.name, f"tools[{i}].function.name")
    return Function(tool.function.name, ANY_OBJECT)


def _check_name(name: str, param: str) -> None:
    if _UNSPEAKABLE.search(name):
        raise InvalidRequest(f"`{param}` must have letters, digits, `_` and `-` only.", param=param)


def _wanted(request: ChatRequest, start: str) -> Schema | None:
    """The schema that `response_format` sets."""
    wanted = request.response_format
    if wanted is None or wanted.type == "text":
        return None
    if start == "content_continuation":
        raise InvalidRequest(
            "`response_format` can't be kept where the answer continues a message.", param="response_format"
        )
    if wanted.json_schema is None:
        return ANY_OBJECT
    return enforceable(wanted.json_schema.schema, "response_format.json_schema.schema")
