"""Logprobs that wait until the text their tokens end in is passed on."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from deepseek_api_compat.protocol.job import TokenLogprob


class PendingLogprobs:
    """The logprobs of a text of which only a part is passed on yet. Places are characters from the start."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[int, TokenLogprob]] = deque()

    def add(self, tokens: Sequence[TokenLogprob], end: int) -> None:
        """More tokens; the text that came with them ends at `end`."""
        ends = []
        for token in reversed(tokens):
            ends.append(end)
            # A character that is split between tokens counts with its first byte.
            end -= sum(byte & 0xC0 != 0x80 for byte in token.bytes_)
        self._waiting.extend(zip(reversed(ends), tokens, strict=True))

    def take(self, end: int) -> list[TokenLogprob] | None:
        """Those of all tokens that end at `end` or before, once; None if there are none."""
        taken = []
        while self._waiting and self._waiting[0][0] <= end:
            taken.append(self._waiting.popleft()[1])
        return taken or None
