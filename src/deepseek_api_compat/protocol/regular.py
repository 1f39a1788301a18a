"""Regular expressions that can be continued: after some text, what may still follow.

An expression is taken apart by its derivatives (Brzozowski 1964, "Derivatives of regular expressions"):
`after(c)` matches what, put behind the character `c`, the expression matches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias
from weakref import WeakValueDictionary

Ranges: TypeAlias = tuple[tuple[int, int], ...]

LAST = 0x10FFFF
_SURROGATES = (0xD800, 0xDFFF)  # no characters
_REMEMBERED = 1024  # steps of one expression


class Unreadable(ValueError):
    """A regular expression beyond what is read here: flags, `\\p{...}`, anchors inside of it and so on."""


class Expr:
    """An expression: a set of characters, one after another, one of several, or a repetition.

    nullable: whether it matches the empty text. size: about how many sets it has, as a measure of work.
    Equal expressions are one object, so that alternatives that become the same are kept once, and what has
    been worked out for one is known for all.
    """

    __slots__ = ("__weakref__", "_steps", "nullable", "size")

    def __init__(self, *, nullable: bool, size: int) -> None:
        self._steps: dict[str, Expr] = {}
        self.nullable = nullable
        self.size = size

    def __repr__(self) -> str:
        return f"Expr({self.written()!r})"

    def after(self, character: str) -> Expr:
        """What may follow the character: NOTHING if it can't be there."""
        step = self._steps.get(character)
        if step is None:
            if len(self._steps) >= _REMEMBERED:
                self._steps.clear()
            step = self._steps[character] = self._after(character)
        return step

    def knows(self, character: str) -> bool:
        """Whether `after` has been worked out already."""
        return character in self._steps

    def matches(self, text: str) -> bool:
        left = self
        for character in text:
            left = left.after(character)
        return left.nullable

    def written(self) -> str:
        """It in the syntax of Rust's `regex`. Raises Unreadable for NOTHING, which has none."""
        return self._alternatives("")

    def _after(self, character: str) -> Expr:
        return NOTHING

    def _alternatives(self, wrap: str) -> str:
        """Written; where `wrap` follows it, a quantifier or more of a sequence, as one unit."""
        raise Unreadable("nothing matches")


class _Empty(Expr):
    __slots__ = ()

    def _alternatives(self, wrap: str) -> str:
        return "(?:)"


class _Set(Expr):
    __slots__ = ("ranges",)

    def __init__(self, ranges: Ranges) -> None:
        super().__init__(nullable=False, size=1)
        self.ranges = ranges

    def _after(self, character: str) -> Expr:
        code = ord(character)
        return EMPTY if any(low <= code <= high for low, high in self.ranges) else NOTHING

    def _alternatives(self, wrap: str) -> str:
        low, high = self.ranges[0]
        if len(self.ranges) == 1 and low == high:
            return _character(low)
        spans = (
            _character(low) if low == high else f"{_character(low)}-{_character(high)}"
            for low, high in self.ranges
        )
        return f"[{''.join(spans)}]"


class _Sequence(Expr):
    __slots__ = ("_first", "_rest")

    def __init__(self, first: Expr, rest: Expr) -> None:
        super().__init__(nullable=first.nullable and rest.nullable, size=first.size + rest.size)
        self._first = first
        self._rest = rest

    def parts(self) -> Iterator[Expr]:
        left: Expr = self
        while isinstance(left, _Sequence):
            yield left._first
            left = left._rest
        yield left

    def _after(self, character: str) -> Expr:
        step = sequence(self._first.after(character), self._rest)
        return one_of([step, self._rest.after(character)]) if self._first.nullable else step

    def _alternatives(self, wrap: str) -> str:
        text = "".join(part._alternatives("more") for part in self.parts())
        return f"(?:{text})" if wrap == "quantifier" else text


class _Choice(Expr):
    __slots__ = ("options",)

    def __init__(self, options: frozenset[Expr]) -> None:
        nullable = any(option.nullable for option in options)
        super().__init__(nullable=nullable, size=sum(option.size for option in options))
        self.options = options

    def _after(self, character: str) -> Expr:
        return one_of(option.after(character) for option in self.options)

    def _alternatives(self, wrap: str) -> str:
        text = "|".join(sorted(option._alternatives("") for option in self.options))
        return f"(?:{text})" if wrap else text


class _Repeat(Expr):
    __slots__ = ("item", "least", "most")

    def __init__(self, item: Expr, least: int, most: int | None) -> None:
        super().__init__(nullable=not least, size=item.size + 1)
        self.item, self.least, self.most = item, least, most

    def _after(self, character: str) -> Expr:
        most = None if self.most is None else self.most - 1
        return sequence(self.item.after(character), repeat(self.item, max(self.least - 1, 0), most))

    def _alternatives(self, wrap: str) -> str:
        item = self.item._alternatives("quantifier")
        text = f"{item}{_quantifier(self.least, self.most)}"
        return f"(?:{text})" if wrap == "quantifier" else text


EMPTY: Expr = _Empty(nullable=True, size=1)
NOTHING = Expr(nullable=False, size=1)
_made: WeakValueDictionary[tuple[object, ...], Expr] = WeakValueDictionary()


def _make(kind: Callable[..., Expr], *parts: object) -> Expr:
    """The one expression of this kind and these parts."""
    key = (kind, *parts)
    found = _made.get(key)
    if found is None:
        found = _made[key] = kind(*parts)
    return found


def any_of(ranges: Iterable[tuple[int, int]]) -> Expr:
    """One character whose code is in one of the ranges, first and last included."""
    merged = _merged(ranges)
    return _make(_Set, merged) if merged else NOTHING


def sequence(*parts: Expr) -> Expr:
    whole = EMPTY
    for part in reversed(parts):
        if part is NOTHING or whole is NOTHING:
            return NOTHING
        if whole is EMPTY:
            whole = part
        elif part is not EMPTY:
            whole = _joined(part, whole)
    return whole


def _joined(part: Expr, rest: Expr) -> Expr:
    """Sequences lean to the right, so that equal ones are made of equal parts."""
    firsts = [*part.parts()] if isinstance(part, _Sequence) else [part]
    for first in reversed(firsts):
        rest = _make(_Sequence, first, rest)
    return rest


def one_of(options: Iterable[Expr]) -> Expr:
    found: set[Expr] = set()
    for option in options:
        if isinstance(option, _Choice):
            found |= option.options
        elif option is not NOTHING:
            found.add(option)
    if not found:
        return NOTHING
    return found.pop() if len(found) == 1 else _make(_Choice, frozenset(found))


def repeat(item: Expr, least: int = 0, most: int | None = None) -> Expr:
    if most == 0 or item is EMPTY or (item is NOTHING and not least):
        return EMPTY
    if item is NOTHING or (least, most) == (1, 1):
        return item
    return _make(_Repeat, item, 0 if item.nullable else least, most)


def literal(text: str) -> Expr:
    return sequence(*(_make(_Set, ((ord(character), ord(character)),)) for character in text))


def outside(ranges: Ranges) -> Ranges:
    """All characters but those."""
    rest, start = [], 0
    for low, high in sorted({*ranges, _SURROGATES}):
        if low > start:
            rest.append((start, low - 1))
        start = max(start, high + 1)
    return (*rest, (start, LAST)) if start <= LAST else tuple(rest)


def _merged(ranges: Iterable[tuple[int, int]]) -> Ranges:
    found: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        elif low <= high:
            found.append((low, high))
    return tuple(found)


ANY_CHARACTER = any_of(outside(()))
ANY_TEXT = repeat(ANY_CHARACTER)


def mapped(expr: Expr, characters: Callable[[Ranges], Expr]) -> Expr:
    """The expression with what `characters` makes of it in place of each set of characters."""
    if isinstance(expr, _Set):
        return characters(expr.ranges)
    if isinstance(expr, _Sequence):
        parts = [mapped(part, characters) for part in expr.parts()]
        return sequence(*parts)
    if isinstance(expr, _Choice):
        return one_of(mapped(option, characters) for option in expr.options)
    if isinstance(expr, _Repeat):
        return repeat(mapped(expr.item, characters), expr.least, expr.most)
    return expr


def _character(code: int) -> str:
    character = chr(code)
    plain = character.isascii() and character.isalnum()
    return character if plain else f"\\x{{{code:x}}}"


def _quantifier(least: int, most: int | None) -> str:
    signs: dict[tuple[int, int | None], str] = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    if least == most:
        return f"{{{least}}}"
    return signs.get((least, most), f"{{{least},{'' if most is None else most}}}")
