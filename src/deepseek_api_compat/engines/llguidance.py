"""A grammar in the words of llguidance: its dialect of Lark.

Source: llguidance 1.0, `docs/syntax.md`. llama.cpp, vLLM and SGLang all take this text, llama.cpp and SGLang
with the first line. A terminal (upper case) is one regular expression, a rule (lower case) is not; text
never matches a control token, whose id has to be given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_api_compat.protocol.grammar import (
    Exactly,
    Free,
    Grammar,
    Json,
    OneOf,
    Repeat,
    Seq,
    Until,
)
from deepseek_api_compat.protocol.segment import Segment

# One line, spaced as json.dumps does it: where white space is free, small models never get past it.
# `oneOf` as `anyOf`: only schemas for which that is the same come here.
_GUIDANCE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
_REGEX_SYNTAX = re.compile(r"[.^$*+?()\[\]{}|\\/]")


def lark(grammar: Grammar, controls: Mapping[str, int], *, lead: str = "", forcing: bool = True) -> str:
    """The grammar's text; `lead` is a text in front of all that it allows.

    controls: the ids of the model's control tokens. One that it lacks is matched as text.
    forcing: where only one text may follow, its usual tokens are taken without asking the model. Right for
    the model and quick, but llama.cpp takes control tokens where the text spells them: see `literals`.
    """
    writer = _Writer(controls)
    body = writer.rule(grammar)
    start = f"{_quoted(lead)} {body}" if lead else body
    options = "{}" if forcing else '{"no_forcing": true}'
    return "\n".join([f"%llguidance {options}", f"start: {start}", *writer.lines, ""])


def spellings(grammar: Grammar) -> set[str]:
    """The control tokens that a grammar would like to have."""
    return {segment.text for segment in _segments(grammar) if segment.special}


def literals(grammar: Grammar, controls: Mapping[str, int]) -> str:
    """All text that the grammar prescribes. A control token's spelling in it must not become that token."""
    written = [segment.text for segment in _segments(grammar) if segment.text not in controls]
    return "\n".join([*written, *(json.dumps(schema, ensure_ascii=False) for schema in _schemas(grammar))])


def _schemas(grammar: Grammar) -> Iterator[dict[str, Any]]:
    for part in _parts(grammar):
        if isinstance(part, Json):
            yield part.schema


def _segments(grammar: Grammar) -> Iterator[Segment]:
    for part in _parts(grammar):
        if isinstance(part, Exactly):
            yield from part.segments
        elif isinstance(part, Until):
            yield from part.marker


def _parts(grammar: Grammar) -> Iterator[Grammar]:
    """The grammar and all grammars in it."""
    yield grammar
    if isinstance(grammar, Seq):
        inner = grammar.parts
    elif isinstance(grammar, OneOf):
        inner = grammar.options
    else:
        inner = (grammar.item,) if isinstance(grammar, Repeat) else ()
    for part in inner:
        yield from _parts(part)


class _Writer:
    """Writes rules and terminals of one grammar, equal ones once."""

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._controls = controls
        self._names: dict[str, str] = {}
        self.lines: list[str] = []

    def rule(self, grammar: Grammar) -> str:
        """What stands for the grammar in the body of another rule."""
        if isinstance(grammar, Exactly):
            return self._exactly(grammar.segments)
        if isinstance(grammar, Json):
            schema: dict[str, Any] = {**grammar.schema, "x-guidance": _GUIDANCE}
            return self._named("json", "%json " + json.dumps(schema, ensure_ascii=False))
        if isinstance(grammar, Free):
            return self._free(grammar.without)
        if isinstance(grammar, Until):
            return self._until(grammar)
        if isinstance(grammar, Repeat):
            most = "" if grammar.most is None else grammar.most
            return f"{self._named('item', self.rule(grammar.item))}{{0,{most}}}"
        if isinstance(grammar, Seq):
            return " ".join(filter(None, map(self.rule, grammar.parts))) or '""'
        return self._named("any", " | ".join(map(self.rule, grammar.options)))

    def _exactly(self, segments: tuple[Segment, ...]) -> str:
        return " ".join(part if token else _quoted(part) for token, part in self._parts(segments))

    def _parts(self, segments: tuple[Segment, ...]) -> list[tuple[bool, str]]:
        """Tokens, as Lark writes them, and the text between them, in one piece."""
        parts: list[tuple[bool, str]] = []
        for segment in segments:
            id = self._controls.get(segment.text) if segment.special else None
            if id is not None:
                parts.append((True, f"<[{id}]>"))
            elif parts and not parts[-1][0]:
                parts[-1] = (False, parts[-1][1] + segment.text)
            else:
                parts.append((False, segment.text))
        return parts

    def _free(self, without: tuple[str, ...]) -> str:
        if not without:
            return self._named("TEXT", "/(?s:.*)/")
        banned = "|".join(map(_escaped, without))
        return self._named("TEXT", f"/(?s:.*)/ & ~/(?s:.*)({banned})(?s:.*)/")

    def _until(self, grammar: Until) -> str:
        body = self._free(grammar.without)
        parts = self._parts(grammar.marker)
        # A lexer takes all the text it can: what begins the marker must be in the same terminal.
        if not parts[0][0]:
            body = self._named("TEXT", f"{body} {_quoted(parts.pop(0)[1])}")
        return " ".join([body, *(part if token else _quoted(part) for token, part in parts)])

    def _named(self, kind: str, body: str) -> str:
        if body not in self._names:
            self._names[body] = f"{kind}_{len(self._names)}"
            self.lines.append(f"{self._names[body]}: {body}")
        return self._names[body]


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _REGEX_SYNTAX.sub(r"\\\g<0>", text).replace("\n", r"\n")
