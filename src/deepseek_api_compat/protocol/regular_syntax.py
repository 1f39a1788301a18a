"""How regular expressions are written in JSON Schema's `pattern`, as llguidance reads it.

That is the syntax of Rust's `regex`, with the digits and word characters of ASCII; sets in sets, flags and
`\\p{...}` are not read here.
"""

from __future__ import annotations

from deepseek_api_compat.protocol.regular import (
    ANY_TEXT,
    Expr,
    Ranges,
    Unreadable,
    any_of,
    one_of,
    outside,
    repeat,
    sequence,
)

_SHORT = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
_DIGITS: Ranges = ((0x30, 0x39),)
_WORD: Ranges = ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A))
_SPACE: Ranges = (
    *((0x9, 0xD), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680)),
    *((0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
)
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACE}


def pattern(source: str) -> Expr:
    """What matches where `pattern` finds something: `^` and `$` bind it to the ends of a text.

    Raises Unreadable.
    """
    return _Reader(source).searched()


def written_as(source: str) -> Expr:
    """The expression that is written so, for a whole text. Raises Unreadable."""
    return _Reader(source).whole()


class _Reader:
    """Reads one expression, from left to right."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0

    def whole(self) -> Expr:
        return self._ended(self._choice(searching=False))

    def searched(self) -> Expr:
        return self._ended(self._choice(searching=True))

    def _ended(self, expr: Expr) -> Expr:
        if self._at < len(self._source):
            raise Unreadable(f"{self._source[self._at]!r} at {self._at}")
        return expr

    def _choice(self, *, searching: bool) -> Expr:
        options = [self._branch(searching=searching)]
        while self._took("|"):
            options.append(self._branch(searching=searching))
        return one_of(options)

    def _branch(self, *, searching: bool) -> Expr:
        if searching and (group := self._only_group()):
            return group
        begins = searching and self._took("^")
        parts: list[Expr] = []
        ends = False
        while self._next() not in ("", "|", ")"):
            if searching and self._took("$"):
                ends = True
                if self._next() not in ("", "|", ")"):
                    raise Unreadable("more after $")
                break
            parts.append(self._quantified(self._atom()))
        if not searching:
            return sequence(*parts)
        return sequence(*(() if begins else (ANY_TEXT,)), *parts, *(() if ends else (ANY_TEXT,)))

    def _only_group(self) -> Expr | None:
        """A branch that is a group and nothing else may have anchors inside."""
        start = self._at
        if not self._took("("):
            return None
        self._named()
        try:
            group = self._choice(searching=True)
            if self._took(")") and self._next() in ("", "|", ")"):
                return group
        except Unreadable:
            pass  # then it is read once more, as a part of its branch
        self._at = start
        return None

    def _quantified(self, item: Expr) -> Expr:
        while (bounds := self._bounds()) is not None:
            self._took("?")  # it only says what is tried first
            if self._next() == "+":
                raise Unreadable("possessive")
            item = repeat(item, *bounds)
        return item

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._took(sign):
                return bounds
        if not self._took("{"):
            return None
        least, comma, most = self._upto("}").partition(",")
        if not least.isdecimal() or not (most.isdecimal() or not most):
            raise Unreadable("{")
        if not comma:
            return int(least), int(least)
        return int(least), int(most) if most else None

    def _atom(self) -> Expr:
        if self._took("("):
            self._named()
            group = self._choice(searching=False)
            if not self._took(")"):
                raise Unreadable("a group without its end")
            return group
        if self._took("["):
            return any_of(self._set())
        character = self._take()
        if character == ".":
            return any_of(outside(((0xA, 0xA),)))
        if character in "^$*+?{)":
            raise Unreadable(repr(character))
        return any_of(self._escape() if character == "\\" else ((ord(character), ord(character)),))

    def _named(self) -> None:
        """Past what says what kind of group it is."""
        if not self._took("?") or self._took(":"):
            return
        self._took("P")
        if not self._took("<") or self._next() in ("=", "!"):
            raise Unreadable("a group with flags, or that looks around")
        self._upto(">")

    def _set(self) -> Ranges:
        negated = self._took("^")
        ranges: list[tuple[int, int]] = []
        first = True
        while first or self._next() != "]":
            first = False
            if self._source[self._at : self._at + 2] in ("&&", "--", "~~") or self._next() == "[":
                raise Unreadable("a set of sets")
            ranges += self._span()
        self._take()
        return outside(tuple(ranges)) if negated else tuple(ranges)

    def _span(self) -> Ranges:
        low = self._member()
        if self._next() != "-" or self._source[self._at + 1 : self._at + 2] in ("]", ""):
            return low
        self._take()
        high = self._member()
        if len(low) != 1 or len(high) != 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
            raise Unreadable("a range of sets")
        return ((low[0][0], high[0][0]),)

    def _member(self) -> Ranges:
        character = self._take()
        return self._escape() if character == "\\" else ((ord(character), ord(character)),)

    def _escape(self) -> Ranges:
        character = self._take()
        if character.lower() in _SETS:
            ranges = _SETS[character.lower()]
            return ranges if character.islower() else outside(ranges)
        if character in "xu":
            code = self._code(2 if character == "x" else 4)
        elif character in _SHORT:
            code = ord(_SHORT[character])
        elif character.isalnum():
            raise Unreadable(f"\\{character}")
        else:
            code = ord(character)
        return ((code, code),)

    def _code(self, digits: int) -> int:
        text = self._upto("}") if self._took("{") else "".join(self._take() for _ in range(digits))
        try:
            return int(text, 16)
        except ValueError:
            raise Unreadable(f"the code {text!r}") from None

    def _next(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        if self._at >= len(self._source):
            raise Unreadable("it ends too early")
        self._at += 1
        return self._source[self._at - 1]

    def _took(self, sign: str) -> bool:
        found = self._next() == sign
        self._at += found
        return found

    def _upto(self, end: str) -> str:
        found = self._source.find(end, self._at)
        if found < 0:
            raise Unreadable(f"no {end}")
        text, self._at = self._source[self._at : found], found + 1
        return text
