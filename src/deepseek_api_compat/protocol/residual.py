"""The grammar of the rest: what may follow the part of an answer that has been sent.

Engines begin every grammar at its root. Where an answer goes on at another engine, that one is given the
grammar of what is still to come. It is found by following the grammar along what was sent (derivatives again,
see `regular`): what is not reached stays as it is, a JSON value that was begun is taken apart (`json_texts`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import product
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
    one_of,
)
from deepseek_api_compat.protocol.json_texts import JsonTexts
from deepseek_api_compat.protocol.json_values import Number, Text, TooComplex, Value, is_multiple
from deepseek_api_compat.protocol.regular import EMPTY, NOTHING, Expr, Unreadable, literal
from deepseek_api_compat.protocol.regular import one_of as any_expr
from deepseek_api_compat.protocol.segment import Segment

MOST_WORK = 300_000  # steps through grammars and expressions
MOST_PARTS = 20_000  # of a rest
DEEPEST = 120  # parts in each other
_MOST_DIGITS = 4  # that a number is given which must be a multiple of another
_FIRST_MARK = 0xD800  # surrogates stand for control tokens: no text has them
_SURROGATE = re.compile("[\ud800-\udfff]")
_NO_TEXT = Exactly(())
_ANY_STRING = Text()


class NotItsBeginning(ValueError):
    """What was sent is no beginning of what the grammar allows."""


class _Outcome:
    """Where a grammar may have ended in what was sent, and what remains of it where that ended first."""

    __slots__ = ("ends", "rests")

    def __init__(self) -> None:
        self.ends: set[int] = set()
        self.rests: list[Grammar] = []


def residual(grammar: Grammar, sent: Sequence[Segment]) -> Grammar | None:
    """The grammar of exactly the texts that complete `sent` to one of `grammar`.

    sent: what was sent, in order; a special segment is a control token. None where the rest can't be told
    (docs/resilience.md says when). Raises NotItsBeginning.
    """
    try:
        rests = _Walk(sent).rests(grammar)
        if rests:
            rest = one_of(rests)
            _depth(rest, {})
            return rest
    except (TooComplex, Unreadable, RecursionError):
        return None
    raise NotItsBeginning("what was sent is no beginning of what the grammar allows")


def segments(ids: Iterable[int], text: str, controls: Mapping[int, str]) -> list[Segment]:
    """What a piece of an answer says: its text, and in it the control tokens that are among its ids.

    controls: their spellings, by id. Where a token's spelling is not in the text, the token stands alone.
    """
    found: list[Segment] = []
    for spelling in (controls[id] for id in ids if id in controls):
        before, there, behind = text.partition(spelling)
        if there:
            found.append(Segment(before, False))
            text = behind
        found.append(Segment(spelling, True))
    return [segment for segment in (*found, Segment(text, False)) if segment.text]


def _depth(grammar: Grammar, depths: dict[int, int]) -> int:
    """How deep its parts are in each other; `depths` has those that are known, by id."""
    if id(grammar) not in depths:
        inner = _inside(grammar) if isinstance(grammar, (Seq, OneOf, Repeat)) else ()
        depths[id(grammar)] = 1 + max((_depth(part, depths) for part in inner), default=0)
        if len(depths) > MOST_PARTS or depths[id(grammar)] > DEEPEST:
            raise TooComplex("too many parts")
    return depths[id(grammar)]


def _inside(grammar: Seq | OneOf | Repeat) -> tuple[Grammar, ...]:
    if isinstance(grammar, Seq):
        return grammar.parts
    return grammar.options if isinstance(grammar, OneOf) else (grammar.item,)


class _Walk:
    """Follows grammars along one text."""

    def __init__(self, sent: Sequence[Segment]) -> None:
        self._marks: dict[str, str] = {}
        self._text = "".join(map(self._read, sent))
        self._end = len(self._text)
        self._known: dict[tuple[int, int], tuple[Grammar, _Outcome]] = {}  # by the grammar's id, and where
        self._grammars: dict[int, tuple[Value, Grammar]] = {}
        self._texts: dict[int, JsonTexts] = {}
        self._work = 0
        self._follow: dict[type, Callable[[Any, int, _Outcome], None]] = {
            Exactly: self._exactly,
            Json: self._json,
            Pattern: self._pattern,
            Free: self._free,
            Until: self._until,
            Seq: self._seq,
            OneOf: self._one_of,
            Repeat: self._repeat,
        }

    def _read(self, segment: Segment) -> str:
        if segment.special:
            return self._marks.setdefault(segment.text, chr(_FIRST_MARK + len(self._marks)))
        return _SURROGATE.sub("\ufffd", segment.text)

    def rests(self, grammar: Grammar) -> list[Grammar]:
        """All that may remain."""
        outcome = self._from(grammar, 0)
        return [_NO_TEXT, *outcome.rests] if self._end in outcome.ends else outcome.rests

    def _spend(self, work: int) -> None:
        self._work += work
        if self._work > MOST_WORK:
            raise TooComplex("too much work")

    def _from(self, grammar: Grammar, at: int) -> _Outcome:
        key = (id(grammar), at)
        if key not in self._known:
            self._spend(1)
            outcome = _Outcome()
            if at == self._end:
                outcome.rests.append(grammar)
            else:
                self._follow[type(grammar)](grammar, at, outcome)
            if len(outcome.rests) > 1:  # one object, however many ways lead here
                outcome.rests = [OneOf(tuple(outcome.rests))]
            self._known[key] = (grammar, outcome)
        return self._known[key][1]

    def _one_of(self, grammar: OneOf, at: int, into: _Outcome) -> None:
        for option in grammar.options:
            found = self._from(option, at)
            into.ends |= found.ends
            into.rests += found.rests

    def _exactly(self, grammar: Exactly, at: int, into: _Outcome) -> None:
        found = self._match(grammar.segments, self._text, at)
        if isinstance(found, int):
            into.ends.add(found)
        elif found is not None:
            into.rests.append(found)

    def _match(self, segments: tuple[Segment, ...], text: str, at: int) -> int | Exactly | None:
        """Where they end in the text, or what remains of them behind it; None if something else is there."""
        for i, segment in enumerate(segments):
            if at == len(text):
                return Exactly(segments[i:])
            mark = self._marks.get(segment.text) if segment.special else None
            if mark is not None and text[at] == mark:
                at += 1
            elif text.startswith(segment.text, at):
                at += len(segment.text)
            elif segment.text.startswith(text[at:]):
                begun = Segment(segment.text[len(text) - at :], False)
                return Exactly((begun, *segments[i + 1 :]))
            else:
                return None
        return at

    def _seq(self, grammar: Seq, at: int, into: _Outcome) -> None:
        places = {at}
        for i, part in enumerate(grammar.parts):
            if self._end in places:
                into.rests.append(_joined(*grammar.parts[i:]))
                places.discard(self._end)
            ends: set[int] = set()
            for place in places:
                found = self._from(part, place)
                ends |= found.ends
                into.rests += (_joined(rest, *grammar.parts[i + 1 :]) for rest in found.rests)
            places = ends
        into.ends |= places

    def _repeat(self, grammar: Repeat, at: int, into: _Outcome) -> None:
        states = [(at, 0)]  # how many items have ended where
        seen = set(states)
        for place, count in states:
            if count == grammar.most:
                into.ends.add(place)
                continue
            if place == self._end:
                into.rests.append(_further(grammar, count))
                continue
            if count >= grammar.least:
                into.ends.add(place)
            found = self._from(grammar.item, place)
            into.rests += (_joined(rest, _further(grammar, count + 1)) for rest in found.rests)
            # Beyond the least, it counts only towards a limit.
            more = count + 1 if grammar.most is not None else min(count + 1, grammar.least)
            new = {(end, more) for end in found.ends if end > place} - seen
            seen |= new
            states += new

    def _free(self, grammar: Free, at: int, into: _Outcome) -> None:
        read = grammar.after + self._text[at:]
        clear = self._clear(read, grammar.without)
        stop = at + clear - len(grammar.after)
        into.ends |= {*range(at, min(stop + 1, self._end))}
        self._spend(len(into.ends))
        if clear == len(read):
            into.rests.append(Free(grammar.without, _begun(read, grammar.without)))

    def _until(self, grammar: Until, at: int, into: _Outcome) -> None:
        before = len(grammar.after)
        read = grammar.after + self._text[at:]
        clear = self._clear(read, grammar.without)
        goes_on = clear == len(read)
        for place in self._places(grammar.marker[0], read, clear):
            found = self._match(grammar.marker, read, place)
            if isinstance(found, int):
                into.ends.add(at + found - before)
            elif found is not None and any(mark in read[place:] for mark in self._marks.values()):
                into.rests.append(found)
            elif found is not None:
                goes_on = True  # as `after` has it
        if goes_on:
            marker = "".join(segment.text for segment in grammar.marker)
            after = _begun(read, (*grammar.without, marker))
            into.rests.append(Until(grammar.marker, grammar.without, after))

    def _clear(self, read: str, without: tuple[str, ...]) -> int:
        """How far it is free text: to the first control token, or the last character of a spelling."""
        marks = (read.find(mark) for mark in self._marks.values())
        spelt = ((read.find(spelling), len(spelling) - 1) for spelling in without)
        ends = [at for at in marks if at >= 0] + [at + length for at, length in spelt if at >= 0]
        return min(ends, default=len(read))

    def _places(self, first: Segment, read: str, clear: int) -> Iterator[int]:
        """Where a marker that begins with the segment may begin, up to `clear`."""
        begins = {first.text[0], self._marks.get(first.text, "")} if first.special else {first.text[0]}
        for begin in begins - {""}:
            place = read.find(begin, 0, clear + 1)
            while place >= 0:
                self._spend(1)
                yield place
                place = read.find(begin, place + 1, clear + 1)

    def _pattern(self, grammar: Pattern, at: int, into: _Outcome) -> None:
        exprs, count = (*grammar.matches, *grammar.but), len(grammar.matches)
        for place in range(at, self._end):
            if place > at and _accepts(exprs, count):
                into.ends.add(place)
            character = self._text[place]
            self._spend(sum(expr.size for expr in exprs if not expr.knows(character)))
            exprs = tuple(expr.after(character) for expr in exprs)
            if NOTHING in exprs[:count]:
                return
        if EMPTY in exprs[:count]:
            if _accepts(exprs, count):
                into.ends.add(self._end)
        else:
            but = tuple(expr for expr in exprs[count:] if expr is not NOTHING)
            into.rests.append(Pattern(exprs[:count], but))

    def _json(self, grammar: Json, at: int, into: _Outcome) -> None:
        root = grammar.schema if grammar.root is None else grammar.root
        texts = self._texts.setdefault(id(root), JsonTexts(root))
        for value in texts.values.of(grammar.schema):
            found = self._value(value, texts, at)
            into.ends |= found.ends
            into.rests += found.rests

    def _value(self, value: Value, texts: JsonTexts, at: int) -> _Outcome:
        try:
            found = self._from(self._grammar(value, texts), at)
        except Unreadable:
            if not isinstance(value, Text):
                raise
            # The engine knew the pattern: a string that has its end is one that matches.
            found = self._from(self._grammar(_ANY_STRING, texts), at)
            if found.rests:
                raise
        if isinstance(value, Number) and value.multiples:
            return self._multiples(found, at, value.multiples)
        return found

    def _grammar(self, value: Value, texts: JsonTexts) -> Grammar:
        if id(value) not in self._grammars:
            self._grammars[id(value)] = (value, texts.grammar(value))
        return self._grammars[id(value)][1]

    def _multiples(self, numbers: _Outcome, at: int, of: tuple[Decimal, ...]) -> _Outcome:
        """Of these numbers, the multiples; one that was begun is given a few digits more at most."""
        outcome = _Outcome()
        outcome.ends = {end for end in numbers.ends if is_multiple(self._text[at:end], of)}
        begun = self._text[at:]
        for rest in numbers.rests:
            if isinstance(rest, Pattern):
                outcome.rests.append(_digits(begun, rest, of))
        return outcome


def _digits(begun: str, rest: Pattern, of: tuple[Decimal, ...]) -> Pattern:
    """With two digits more, or as many as make a multiple. Raises TooComplex if that takes too many."""
    for most in range(2, _MOST_DIGITS + 1):
        tails = [tail for tail in _tails(most) if all(expr.matches(tail) for expr in rest.matches)]
        found = [tail for tail in tails if is_multiple(begun + tail, of)]
        if found:
            return Pattern((any_expr(map(literal, found)),))
    raise TooComplex("a multiple that takes many digits")


def _tails(most: int) -> Iterator[str]:
    """Up to so many digits, behind a point too."""
    for count in range(most + 1):
        for digits in product("0123456789", repeat=count):
            yield "".join(digits)
            if digits:
                yield "." + "".join(digits)


def _accepts(exprs: Sequence[Expr], count: int) -> bool:
    """Do the first `count` match here, and the others not?"""
    return all(expr.nullable == (n < count) for n, expr in enumerate(exprs))


def _begun(read: str, spellings: Iterable[str]) -> str:
    """The longest end of a text with which a spelling begins."""
    spellings = [*spellings]
    for start in range(max(0, len(read) - max(map(len, spellings), default=0)), len(read)):
        if any(spelling.startswith(read[start:]) for spelling in spellings):
            return read[start:]
    return ""


def _further(grammar: Repeat, count: int) -> Grammar:
    """What remains of a repetition after `count` items."""
    most = None if grammar.most is None else grammar.most - count
    return Repeat(grammar.item, most, max(grammar.least - count, 0)) if most != 0 else Seq(())


def _joined(*parts: Grammar) -> Grammar:
    """One after another; of the first, which was begun, what remains."""
    first, *others = parts
    begun = first.parts if isinstance(first, Seq) else () if first is _NO_TEXT else (first,)
    joined = (*begun, *others)
    return joined[0] if len(joined) == 1 else Seq(joined)
