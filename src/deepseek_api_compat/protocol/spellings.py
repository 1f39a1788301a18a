"""The spellings of control tokens: found in rendered prompts, and defused in what comes from a request.

A template writes control tokens as text, and so can anybody who writes a message. To tell them apart, a
*mark*, a character that occurs nowhere else, is put into each spelling in the request's texts before they
are rendered. In the rendered prompt a whole spelling then is the template's own; the marks are taken out
of the rest. Spellings could also be put together from two texts, or from a text and what the template
writes around it; so a text that begins or ends within a spelling gets a mark there.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.segment import Segment

_PRIVATE = re.compile("[\ue000-\uf8ff]")
_ESCAPED = re.compile(r"\\u([ef][0-9a-f]{3})", re.IGNORECASE)
_IN_SOURCE = re.compile(r"<\|[^<>|\s]+\|>|<｜[^<>｜\s]+｜>")  # what a template's own control tokens look like

_STEP = 1 << 20  # characters to search at a time: other threads wait meanwhile


def spelled_in(source: str) -> set[str]:
    """What looks like a control token in a template's source; for models that don't say which they have."""
    return set(_IN_SOURCE.findall(source))


class Spellings:
    """The control tokens of a model, and what of them the template `source` puts together from parts.

    Texts are searched without regard to case, because a template may change it.
    """

    def __init__(self, spellings: Collection[str], source: str) -> None:
        # One character can't be broken by a mark; and what is only white space would be in every text.
        words = sorted({word for word in spellings if len(word) > 1 and not word.isspace()})
        lower = sorted({word.lower() for word in words})
        self._exact = re.compile(f"({_any_of(words)})") if words else None
        self._any_case = re.compile(f"(?:{_any_of(lower)})", re.IGNORECASE) if words else None
        self._longest = max(map(len, lower), default=0)
        self._heads = {word[:at] for word in lower for at in range(1, len(word))}
        self._tails = {word[at:] for word in lower for at in range(1, len(word))}
        self._first = {word[0] for word in lower}
        self._last = {word[-1] for word in lower}
        self._gaps = self._left_open(lower, source.lower())

    def __contains__(self, word: str) -> bool:
        return self._exact is not None and self._exact.fullmatch(word) is not None

    def _left_open(self, words: Iterable[str], source: str) -> tuple[str, ...]:
        """What is missing where the template writes the head and the tail of a spelling around a value.

        `<|{{ role }}|>`, say, makes "user" the gap of `<|user|>`. Literals end at quotes and braces.
        """
        borders = [found.start() for found in re.finditer(r"""['"{}]""", source)]
        heads = {
            head for at in borders for head in self._heads_at_end(source[max(0, at - self._longest) : at])
        }
        tails = {
            tail for at in borders for tail in self._tails_at_start(source[at + 1 : at + 1 + self._longest])
        }
        return tuple(
            {
                word[len(head) : len(word) - len(tail)]
                for word in words
                for head in heads
                if word.startswith(head)
                for tail in tails
                if word.endswith(tail) and len(head) + len(tail) < len(word)
            }
        )

    def _heads_at_end(self, end: str) -> Iterator[str]:
        return (end[at:] for at, c in enumerate(end) if c in self._first and end[at:] in self._heads)

    def _tails_at_start(self, start: str) -> Iterator[str]:
        return (
            start[: at + 1]
            for at, c in enumerate(start)
            if c in self._last and start[: at + 1] in self._tails
        )

    def threaten(self, text: str) -> bool:
        """Could this text, as part of a prompt, spell a control token or a part of one?"""
        if self._any_case is None:
            return False
        step = _STEP + self._longest  # they overlap
        if any(self._any_case.search(text, at, at + step) for at in range(0, len(text), _STEP)):
            return True
        core = text.strip()
        return self._begins_inside(core) or self._ends_inside(core) or self._fills_gap(core)

    def _begins_inside(self, core: str) -> bool:
        start = core[: self._longest].lower()
        return not self._last.isdisjoint(start) and any(True for _ in self._tails_at_start(start))

    def _fills_gap(self, core: str) -> bool:
        return core != "" and any(core.lower() in gap for gap in self._gaps)

    def _ends_inside(self, core: str) -> bool:
        end = core[-self._longest :].lower()
        return not self._first.isdisjoint(end) and any(True for _ in self._heads_at_end(end))

    def marked(self, text: str, mark: str, *, gaps: bool = True) -> str:
        """The text with marks in all spellings, and at an end that is within one (inside of white space).

        Without `gaps` a text that fills one stays as it is: a word that templates compare with their own.
        """
        if self._any_case is None:
            return text
        while self._any_case.search(text):  # again for spellings that overlap
            text = self._any_case.sub(lambda found: found[0][0] + mark + found[0][1:], text)
        core = text.strip()
        start = text.index(core)
        if self._ends_inside(core):
            text = f"{text[: start + len(core)]}{mark}{text[start + len(core) :]}"
        if self._begins_inside(core) or (gaps and self._fills_gap(core)):
            text = f"{text[:start]}{mark}{text[start:]}"
        return text

    def split(self, rendered: str, mark: str = "") -> list[Segment]:
        """A rendered prompt as segments, without marks."""
        pieces = [rendered] if self._exact is None else self._exact.split(rendered)
        segments = (Segment(piece, special=bool(at % 2)) for at, piece in enumerate(pieces))
        if mark:
            # Where a template escapes what is not ASCII, the mark is escaped too.
            marks = re.compile(f"{mark}|\\\\u{ord(mark):04x}")
            segments = (one if one.special else Segment(marks.sub("", one.text), False) for one in segments)
        return [segment for segment in segments if segment.text]


def free_mark(texts: Iterable[str]) -> str:
    """A character for private use that is in none of the texts, not even as a JSON escape.

    Raises InvalidRequest if there is none.
    """
    used: set[int] = set()
    for text in texts:
        used.update(map(ord, _PRIVATE.findall(text)))
        used.update(int(digits, 16) for digits in _ESCAPED.findall(text))
    for code in range(0xE000, 0xF900):
        if code not in used:
            return chr(code)
    raise InvalidRequest("The messages use every character for private use there is.", param="messages")


def texts_of(value: Any) -> Iterator[str]:
    """All strings of a JSON value, keys too."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, dict):
            yield from one
            left.extend(one.values())
        elif isinstance(one, (list, tuple)):
            left.extend(one)


_ENUMERATIONS = ("role", "type")  # their values are words that templates ask for


def marked_value(spellings: Spellings, value: Any, mark: str, *, gaps: bool = True) -> Any:
    """A JSON value with all its strings marked, keys too."""
    if isinstance(value, str):
        return spellings.marked(value, mark, gaps=gaps)
    if isinstance(value, dict):
        return {
            spellings.marked(name, mark, gaps=False): marked_value(
                spellings, one, mark, gaps=name not in _ENUMERATIONS
            )
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [marked_value(spellings, one, mark) for one in value]
    return value


def _any_of(words: Collection[str]) -> str:
    """A pattern for any of the words, the longest where several fit.

    Common beginnings are written once, or a search would take longer the more words there are; models
    have a thousand.
    """
    tails: dict[str, list[str]] = {}
    for word in words:
        tails.setdefault(word[0], []).append(word[1:])
    branches = [re.escape(first) + _rest(rest) for first, rest in tails.items()]
    return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"


def _rest(tails: list[str]) -> str:
    longer = [tail for tail in tails if tail]
    if not longer:
        return ""
    pattern = _any_of(longer)
    return pattern if len(longer) == len(tails) else f"(?:{pattern})?"
