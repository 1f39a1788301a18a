"""Texts that were read out of files before, by what was read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

OVERHEAD = 200  # bytes that an entry takes beside its text, about


class TextCache:
    """Up to `size` bytes of texts, at four for each character; what was used last stays longest."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._texts: OrderedDict[Hashable, str] = OrderedDict()

    def get(self, key: Hashable) -> str | None:
        text = self._texts.get(key)
        if text is not None:
            self._texts.move_to_end(key)
        return text

    def put(self, key: Hashable, text: str) -> None:
        """Keep a text, at the cost of older ones; one larger than the whole cache is not kept."""
        if (old := self._texts.pop(key, None)) is not None:
            self._used -= _weight(old)
        if _weight(text) > self._size:
            return
        self._texts[key] = text
        self._used += _weight(text)
        while self._used > self._size:
            self._used -= _weight(self._texts.popitem(last=False)[1])


def _weight(text: str) -> int:
    return OVERHEAD + 4 * len(text)
