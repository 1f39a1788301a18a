"""How each of DeepSeek's formats writes calls, as grammars.

The layouts are those of the prompts' history (`prompt_v3`, `prompt_v31`, `prompt_v32`; DeepSeek's
`deepseek-recipe` for V4), which is what the models were trained to write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from deepseek_api_compat.protocol.deepseek.segments import CALL_BEGIN, CALL_END, CALLS_BEGIN, CALLS_END, SEP
from deepseek_api_compat.protocol.grammar import (
    MOST_CALLS,
    CallSyntax,
    Exactly,
    Function,
    GenericCalls,
    Grammar,
    Json,
    Repeat,
    Seq,
    Until,
    one_of,
    text,
)
from deepseek_api_compat.protocol.json_schema import ASSERTIONS, Schema, is_of_type, part, resolve
from deepseek_api_compat.protocol.segment import Segment

DSML = "｜DSML｜"  # a control token from V4 on, plain text before
_CONTROL = re.compile(rf"(<｜[^<>｜]+｜>|{DSML})")
_NOT_IN_NAME = re.compile(r'["<\n｜]')  # what the name of a parameter can't have in a tag
_SIMPLE = frozenset({"type", "properties", "required", "additionalProperties"})


def _markup(text: str) -> tuple[Segment, ...]:
    pieces = enumerate(_CONTROL.split(text))
    return tuple(Segment(piece, special=bool(i % 2)) for i, piece in pieces if piece)


class MarkerCalls:
    """Calls between control tokens: V3, R1 (a header, the arguments in a fence) and V3.1 (neither)."""

    def __init__(self, *, header: str, footer: str, between: str) -> None:
        self._header = header
        self._footer = _markup(footer)
        self.lead: tuple[Segment, ...] = ()
        self.opening = _markup(CALLS_BEGIN)
        self.between = _markup(between)
        self.closing = _markup(CALLS_END)
        self.reserved = (CALLS_BEGIN,)
        self.in_thoughts: tuple[str, ...] = ()
        self.usual = MOST_CALLS

    def call(self, function: Function) -> Grammar:
        header = Exactly(_markup(CALL_BEGIN + self._header.format(name=function.name)))
        return Seq((header, Json(function.schema), Exactly(self._footer)))


class DsmlCalls:
    """Calls in DSML tags: V3.2, V4, V4.1. Every parameter has a tag, in the order of the schema.

    Strings are raw up to the end tag (string="true"), all other values JSON; so is a string with a rule that
    raw text can't be held to (`pattern`, a length, a format). Where the arguments are not simply an object
    with properties, they are one JSON text, which the parser reads too.
    """

    def __init__(self, *, blank: str, block: str, nothing: str) -> None:
        """blank: after the bar of a tag; block: the block's tag; nothing: written for no parameters."""
        self._blank = blank
        self._nothing = nothing
        self._value_end = _markup(f"</{DSML}{blank}parameter>\n")
        self.lead = _markup("\n\n")
        self.opening = _markup(f"<{DSML}{block}>\n")
        self.between: tuple[Segment, ...] = ()
        self.closing = _markup(f"</{DSML}{block}>")
        self.reserved = self.in_thoughts = (DSML,)
        self.usual = MOST_CALLS

    def call(self, function: Function) -> Grammar:
        schema = resolve(function.schema, function.schema)
        begin = Exactly(_markup(f'<{DSML}{self._blank}invoke name="{function.name}">\n'))
        end = Exactly(_markup(f"</{DSML}{self._blank}invoke>\n"))
        return Seq((begin, *self._arguments(schema, function.schema), end))

    def _arguments(self, schema: Schema, root: Schema) -> Iterator[Grammar]:
        properties, required = schema.get("properties", {}), schema.get("required", ())
        extra = schema.get("additionalProperties", True)
        if not _is_plain(schema):
            yield Json(part(root, schema))
            yield Exactly(_markup("\n"))
        elif properties:
            for name, value in properties.items():
                begin = Exactly(self._begin(name))
                parameter = Seq((begin, self._value(value, root)))
                yield parameter if name in required else Repeat(parameter, most=1)
        elif extra is not False:
            tag = Exactly(_markup(f'<{DSML}{self._blank}parameter name="'))
            name = Until(_markup('" string="'), ('"', "<", "\n", DSML))
            yield Repeat(Seq((tag, name, self._value(extra, root))))
        elif self._nothing:
            yield Exactly(_markup(self._nothing))

    def _begin(self, name: str) -> tuple[Segment, ...]:
        return _markup(f'<{DSML}{self._blank}parameter name="{name}" string="')

    def _value(self, schema: Any, root: Schema) -> Grammar:
        """From the value of the attribute `string` on."""
        strings: list[Grammar] = []
        others: list[Grammar] = []
        branches = [*_branches(schema, root)]
        for branch in branches:
            strings += [Exactly(_markup(value) + self._value_end) for value in _literals(branch)]
            if (rest := _rest(branch)) is not None:
                others.append(Seq((Json(part(root, rest)), Exactly(self._value_end))))
        if any(map(_any_string, branches)):
            strings = [Until(self._value_end, (DSML,))]
        options = []
        if strings:
            options.append(Seq((text('true">'), one_of(strings))))
        if others:
            options.append(Seq((text('false">'), one_of(others))))
        return one_of(options)


def _is_plain(schema: Schema) -> bool:
    """Do its properties, each for itself, say all about an object?"""
    properties = schema.get("properties", {})
    if ASSERTIONS & schema.keys() - _SIMPLE or any(map(_NOT_IN_NAME.search, properties)):
        return False
    if not properties:
        return not schema.get("required")
    known = all(properties.get(name, False) is not False for name in schema.get("required", ()))
    return known and schema.get("additionalProperties", True) is False and False not in properties.values()


def _branches(schema: Any, root: Schema, seen: set[int] | None = None) -> Iterator[Any]:
    """The schemas of which a value must match one; each allows one type only where that can be told apart."""
    schema = resolve(schema, root)
    seen = set() if seen is None else seen
    if id(schema) in seen:
        return  # it allows itself, or the same twice
    seen.add(id(schema))
    said = {*ASSERTIONS & schema.keys()} if isinstance(schema, dict) else set()
    if said in ({"anyOf"}, {"oneOf"}):
        for option in schema[said.pop()]:
            yield from _branches(option, root, seen)
    elif isinstance(schema, dict) and isinstance(schema.get("type"), list) and not said & {"enum", "const"}:
        for name in schema["type"]:
            yield {**schema, "type": name}
    else:
        yield schema


def _values(schema: Any) -> list[Any] | None:
    """The values of `enum` or `const` that a schema allows; None if it lists none."""
    if not isinstance(schema, dict) or not schema.keys() & {"enum", "const"}:
        return None
    if ASSERTIONS & schema.keys() - {"enum", "const", "type"}:
        return None
    values = [schema["const"]] if "const" in schema else schema["enum"]
    return [value for value in values if is_of_type(value, schema)]


def _literals(schema: Any) -> list[str]:
    """The strings that a schema lists, and that can be written raw."""
    return [value for value in _values(schema) or () if isinstance(value, str) and DSML not in value]


def _any_string(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return schema is True
    return ASSERTIONS & schema.keys() <= {"type"} and schema.get("type", "string") == "string"


def _rest(schema: Any) -> Any:
    """What a schema allows beside the strings that are written raw; None for nothing."""
    listed = _values(schema)
    if listed is not None:
        literals = _literals(schema)
        others = [value for value in listed if value not in literals]
        return {"enum": others} if others else None
    return None if _any_string(schema) and isinstance(schema, dict) and "type" in schema else schema


_V3 = MarkerCalls(header=f"function{SEP}{{name}}\n```json\n", footer=f"\n```{CALL_END}", between="\n")
_SYNTAXES: dict[str, CallSyntax] = {
    "v3": _V3,
    "v3-0324": _V3,
    "v3-tools": _V3,
    "r1": _V3,
    "v3.1": MarkerCalls(header=f"{{name}}{SEP}", footer=CALL_END, between=""),
    "v3.2": DsmlCalls(blank="", block="function_calls", nothing="\n"),
    "v4": DsmlCalls(blank="", block="tool_calls", nothing=""),
    "v4.1": DsmlCalls(blank=" ", block=" calls", nothing="\n"),
    "template": GenericCalls(),
}


def syntax(format: str) -> CallSyntax:
    """How calls are written in a format: one of DeepSeek's, or "template"."""
    return _SYNTAXES[format]
