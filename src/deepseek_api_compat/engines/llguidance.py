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
    Pattern,
    Repeat,
    Seq,
    Until,
)
from deepseek_api_compat.protocol.json_texts import standalone
from deepseek_api_compat.protocol.segment import Segment

# One line, spaced as json.dumps does it: where white space is free, small models never get past it.
# `oneOf` as `anyOf`: only schemas for which that is the same come here.
_GUIDANCE = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "coerce_one_of": True,
}
_NO_TEXT = '""'
_REGEX_CODE = re.compile(r"\\x\{([0-9a-f]+)\}")
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
    written += [json.dumps(schema, ensure_ascii=False) for schema in _schemas(grammar)]
    patterns = [part for part in _parts(grammar) if isinstance(part, Pattern)]
    written += [_read(expr.written()) for part in patterns for expr in part.matches]
    return "\n".join(written)


def _read(regex: str) -> str:
    """The characters of a regular expression, as they are meant."""
    return _REGEX_CODE.sub(lambda code: chr(int(code[1], 16)), regex)


def _schemas(grammar: Grammar) -> Iterator[dict[str, Any]]:
    for part in _parts(grammar):
        if isinstance(part, Json):
            yield _whole(part)


def _segments(grammar: Grammar) -> Iterator[Segment]:
    for part in _parts(grammar):
        if isinstance(part, Exactly):
            yield from part.segments
        elif isinstance(part, Until):
            yield from part.marker


def _parts(grammar: Grammar) -> Iterator[Grammar]:
    """The grammar and all grammars in it, each object once."""
    left, seen = [grammar], {id(grammar)}
    while left:
        part = left.pop()
        yield part
        if isinstance(part, Seq):
            inner = part.parts
        elif isinstance(part, OneOf):
            inner = part.options
        else:
            inner = (part.item,) if isinstance(part, Repeat) else ()
        for inside in inner:
            if id(inside) not in seen:
                seen.add(id(inside))
                left.append(inside)


def _whole(grammar: Json) -> dict[str, Any]:
    """Its schema, with all that this refers to."""
    return grammar.schema if grammar.root is None else standalone(grammar.schema, grammar.root)


class _Writer:
    """Writes rules and terminals of one grammar, equal ones once."""

    def __init__(self, controls: Mapping[str, int]) -> None:
        self._controls = controls
        self._names: dict[str, str] = {}
        self._written: dict[int, str] = {}  # by the grammar's id
        self.lines: list[str] = []

    def rule(self, grammar: Grammar) -> str:
        """What stands for the grammar in the body of another rule."""
        if id(grammar) not in self._written:
            self._written[id(grammar)] = self._rule(grammar)
        return self._written[id(grammar)]

    def _rule(self, grammar: Grammar) -> str:
        if isinstance(grammar, Exactly):
            return self._exactly(grammar.segments)
        if isinstance(grammar, Json):
            schema = {**_whole(grammar), "x-guidance": _GUIDANCE}
            return self._named("json", "%json " + json.dumps(schema, ensure_ascii=False))
        if isinstance(grammar, Pattern):
            return self._pattern(grammar)
        if isinstance(grammar, Free):
            return self._free(grammar.without, grammar.after)
        if isinstance(grammar, Until):
            return self._until(grammar)
        if isinstance(grammar, Repeat):
            most = "" if grammar.most is None else grammar.most
            return f"{self._named('item', self.rule(grammar.item))}{{{grammar.least},{most}}}"
        if isinstance(grammar, Seq):
            return " ".join(filter(None, map(self._inner, grammar.parts))) or _NO_TEXT
        return self._named("any", " | ".join(self.rule(option) or _NO_TEXT for option in grammar.options))

    def _inner(self, grammar: Grammar) -> str:
        """A part of a sequence: a long sequence, which several may share, has its own rule."""
        rule = self.rule(grammar)
        return self._named("seq", rule) if isinstance(grammar, Seq) and len(grammar.parts) > 8 else rule

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

    def _pattern(self, grammar: Pattern) -> str:
        terms = [f"/{expr.written()}/" for expr in grammar.matches]
        terms += [f"~/{expr.written()}/" for expr in grammar.but]
        return self._named("TEXT", " & ".join(terms))

    def _free(self, without: tuple[str, ...], after: str) -> str:
        terms = ["/(?s:.*)/"]
        if without:
            terms.append(f"~/(?s:.*)({'|'.join(map(_escaped, without))})(?s:.*)/")
        if begun := {rest: None for spelling in without for rest in _endings(after, spelling)}:
            terms.append(f"~/({'|'.join(map(_escaped, begun))})(?s:.*)/")
        return self._named("TEXT", " & ".join(terms))

    def _until(self, grammar: Until) -> str:
        parts = self._parts(grammar.marker)
        if parts[0][0]:
            ways = [self._free(grammar.without, grammar.after)]
        else:
            # A lexer takes all the text it can: what begins the marker must be in the same terminal.
            ways = self._ways(grammar, parts.pop(0)[1], last=not parts)
            ways = [self._named("TEXT", " | ".join(ways))]
        return " ".join([*ways, *(part if token else _quoted(part) for token, part in parts)])

    def _ways(self, grammar: Until, mark: str, *, last: bool) -> list[str]:
        """The texts up to the end of the mark: of the first one, or of one that has begun."""
        after, without = grammar.after, grammar.without
        ways = []
        if not _has(after, without):
            ways.append(f"{self._free(without, after)} {_quoted(mark)}")
        for rest in _endings(after, mark, whole=not last):
            if not _has(after[: len(after) - len(mark) + len(rest)], without):
                ways.append(_quoted(rest))
        return ways

    def _named(self, kind: str, body: str) -> str:
        if body not in self._names:
            self._names[body] = f"{kind}_{len(self._names)}"
            self.lines.append(f"{self._names[body]}: {body}")
        return self._names[body]


def _endings(after: str, spelling: str, *, whole: bool = False) -> list[str]:
    """What completes the spelling where it has begun at a text's end; it may be `whole`."""
    counts = range(1, len(spelling) + whole)
    return [spelling[count:] for count in counts if after.endswith(spelling[:count])]


def _has(text: str, spellings: tuple[str, ...]) -> bool:
    return any(spelling in text for spelling in spellings)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    return _REGEX_SYNTAX.sub(r"\\\g<0>", text).replace("\n", r"\n")
