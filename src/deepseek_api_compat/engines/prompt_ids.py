"""Prompts as ids, for engines whose tokenizer makes control tokens of their spelling, whoever wrote it.

The tokenizers of vLLM and SGLang do so and cannot be told not to. A prompt whose text spells none, as nearly
all do, is tokenised in one piece, its own control tokens spelled out. In any other the text is cut in each
spelling (`plain_text`), each piece is tokenised on its own, and the control tokens are put in by their ids.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain

from deepseek_api_compat.engines.plain_text import PlainText
from deepseek_api_compat.protocol.segment import Segment

Tokenize = Callable[[str], Awaitable[list[int]]]


class PromptIds:
    """`controls`: ids of all control tokens, by spelling. `tokenize`: the engine's own, which makes them."""

    def __init__(self, controls: Mapping[str, int], tokenize: Tokenize) -> None:
        self._controls = controls
        self._tokenize = tokenize
        self._plain = PlainText(controls)
        longest_first = sorted(filter(None, controls), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    async def text(self, text: str) -> list[int]:
        """Ids of a text that is text whatever it spells."""
        return await self.encode([Segment(text, special=False)])

    async def encode(self, segments: Sequence[Segment]) -> list[int]:
        """As `TokenEngine.encode`."""
        own = [segment.text for segment in segments if segment.special and segment.text in self._controls]
        whole = "".join(segment.text for segment in segments)
        if not whole:
            return []
        if self._spelled.findall(whole) == own:
            return await self._tokenize(whole)
        return list(chain(*await asyncio.gather(*map(self._part, self._parts(segments)))))

    def _parts(self, segments: Sequence[Segment]) -> list[int | str]:
        parts: list[int | str] = []
        text = ""
        for segment in segments:
            id = self._controls.get(segment.text) if segment.special else None
            if id is None:
                text += segment.text
            else:
                parts += [*self._plain.parts(text), id]
                text = ""
        return [*parts, *self._plain.parts(text)]

    async def _part(self, part: int | str) -> list[int]:
        return [part] if isinstance(part, int) else await self._tokenize(part)
