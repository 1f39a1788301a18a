"""Pieces out of ids and text that do not arrive together. No I/O.

vLLM and SGLang send each id at once, and its text when a character is complete. An answer that is to go on at
another engine is continued behind the ids that were passed on, so no id may be passed on before its text.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping

from deepseek_api_compat.protocol.job import Piece, TokenLogprob

REMEMBERED = 65536  # endings of which it is known whether they are whole


class PieceMaker:
    """Makes pieces of one answer.

    stops: stop strings. The engine ends with one, text included, and it is taken away here: an engine that
        takes it away itself holds text back, and sends the ids of that text.
    hidden: spellings, by id, of control tokens that the engine spells out and that are no part of the text.

    A piece has all ids up to the last one whose text is complete and can't become part of a stop string.
    """

    def __init__(self, stops: Iterable[str] = (), hidden: Mapping[int, str] | None = None) -> None:
        self._hidden = hidden or {}
        self._stops = [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._text = ""
        self._logprobs: list[TokenLogprob] = []
        self.made = 0  # ids so far

    def feed(
        self, ids: list[int], text: str, logprobs: list[TokenLogprob] | None = None, *, whole: bool = True
    ) -> Piece | None:
        """What is complete now; None if nothing is. `whole`: these ids end with a whole character."""
        self.made += len(ids)
        self._ids += ids
        self._logprobs += logprobs or []
        self._text += self._shown(ids, text)
        if not text and ids and ids[-1] not in self._hidden:
            return None
        if not whole or self._may_stop():
            return None
        return self._take()

    def end(self) -> Piece | None:
        """The rest, without a stop string at its end; None if there is nothing."""
        for stop in sorted(self._stops, key=len, reverse=True):
            if self._text.endswith(stop):
                self._text = self._text[: -len(stop)]
                self._forget(len(stop))
                break
        return self._take() if self._ids or self._text else None

    def _forget(self, size: int) -> None:
        """Take away the logprobs of the last `size` characters; of a token that is half of it they stay."""
        while self._logprobs and len(self._logprobs[-1].token) <= size:
            size -= len(self._logprobs.pop().token)

    def _take(self) -> Piece:
        piece = Piece(self._ids, self._text, self._logprobs or None)
        self._ids, self._text, self._logprobs = [], "", []
        return piece

    def _shown(self, ids: list[int], text: str) -> str:
        for id in ids:
            if spelling := self._hidden.get(id):
                text = re.sub(re.escape(spelling), "", text, count=1)
        return text

    def _may_stop(self) -> bool:
        """Whether a stop string, or the beginning of one, is at the end of the text."""
        return any(
            self._text.endswith(stop[:size])
            for stop in self._stops
            for size in range(1, min(len(stop), len(self._text)) + 1)
        )


class WholeCharacters:
    """Tells whether ids end with a whole character. Asks the engine about each kind of ending once."""

    def __init__(self, detokenize: Callable[[list[int]], Awaitable[str]]) -> None:
        self._detokenize = detokenize
        self._known: dict[tuple[int, ...], bool] = {}

    async def at_end(self, ids: list[int]) -> bool:
        """Of one id the engine itself tells, by the text that comes with it."""
        if len(ids) < 2:
            return True
        # UTF-8 has at most four bytes a character, and a token at least one.
        for count in range(1, min(4, len(ids)) + 1):
            if await self._whole(tuple(ids[-count:])):
                return True
        return False

    async def _whole(self, ids: tuple[int, ...]) -> bool:
        if ids not in self._known:
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[ids] = not (await self._detokenize(list(ids))).endswith("\ufffd")
        return self._known[ids]
