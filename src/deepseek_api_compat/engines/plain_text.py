"""Text that must stay text, for a tokenizer that makes tokens of some spellings whatever it is told. No I/O.

llama.cpp does so with "user-defined" tokens, of which DeepSeek's `<think>` is one: `parse_special` is only
for the others. It tokenises each string of a list on its own, though, so such a spelling is cut in two.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise


class PlainText:
    """`eager` are the spellings. Those of one character can't be cut, and are left alone."""

    def __init__(self, eager: Iterable[str]) -> None:
        words = sorted({word for word in eager if len(word) > 1}, key=len, reverse=True)
        # Only the part before the cut is consumed: another spelling may begin in the part behind it.
        cut = (f"{re.escape(word[:at])}(?={re.escape(word[at:])})" for word, at in map(_with_cut, words))
        self._cut = re.compile("|".join(cut)) if words else None

    def parts(self, text: str) -> list[str]:
        """The text in strings of which none has a spelling. None is empty."""
        parts = [text] if text else []
        if self._cut is None:
            return parts
        # A spelling that begins where a longer one does may survive the first cut.
        while any(map(self._cut.search, parts)):
            parts = [piece for part in parts for piece in self._pieces(part)]
        return parts

    def _pieces(self, text: str) -> list[str]:
        assert self._cut is not None
        borders = [0, *(found.end() for found in self._cut.finditer(text)), len(text)]
        return [text[start:end] for start, end in pairwise(borders)]


def _with_cut(word: str) -> tuple[str, int]:
    """Where to cut: behind the last letter that a sign follows, if there is one.

    The tokenizers of the models here all split text there, so the ids on both sides are those that the uncut
    text would have: `<think` and `>`.
    """
    for at in range(len(word) - 1, 0, -1):
        if word[at - 1].isalnum() and not word[at].isalnum():
            return word, at
    return word, len(word) // 2
