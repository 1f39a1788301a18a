"""llguidance itself, over bytes and control tokens: what a grammar allows next, and what it refuses."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from deepseek_api_compat.engines.llguidance import lark
from deepseek_api_compat.protocol.grammar import Grammar
from deepseek_api_compat.protocol.segment import Segment

SPELLINGS = (
    *("<think>", "</think>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>"),
    *("<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "｜DSML｜", "<tool_call>", "</tool_call>"),
)
CONTROLS = {spelling: 256 + n for n, spelling in enumerate(SPELLINGS)}
_NAMES = {id: spelling for spelling, id in CONTROLS.items()}
_CONTROL = re.compile(f"({'|'.join(SPELLINGS)})")
_CLOSING = frozenset(b'"]}')


class _Bytes:
    def __init__(self) -> None:
        self.tokens = [bytes([n]) for n in range(256)]
        self.tokens += [f"<control {n}>".encode() for n in range(len(SPELLINGS))] + [b"<end>"]
        self.special_token_ids = list(range(256, len(self.tokens)))
        self.eos_token_id = len(self.tokens) - 1
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


_TOKENIZER = LLTokenizer(TokenizerWrapper(_Bytes()))
END = _TOKENIZER.eos_token


class Judge:
    """One grammar on its way through one answer."""

    def __init__(self, grammar: Grammar, controls: Mapping[str, int], *, of: LLMatcher | None = None) -> None:
        self._matcher = of or LLMatcher(_TOKENIZER, lark(grammar, controls), log_level=0)
        assert not self._matcher.get_error(), self._matcher.get_error()
        self._grammar, self._controls = grammar, controls

    def copy(self) -> Judge:
        return Judge(self._grammar, self._controls, of=self._matcher.deep_copy())

    def mask(self) -> int:
        """What `next` says, in bits."""
        if self._matcher.is_stopped():
            return 1 << END
        mask = self._matcher.compute_bitmask()
        assert not self._matcher.get_error(), self._matcher.get_error()
        return int.from_bytes(mask, "little")

    def next(self) -> set[int]:
        """The bytes and tokens that may come next; END where it may end."""
        mask = self.mask()
        return {id for id in range(END + 1) if mask >> id & 1}

    def take(self, id: int) -> None:
        assert self._matcher.consume_token(id), self._matcher.get_error()

    def completes(self, ids: Sequence[int]) -> bool:
        """Whether these may come next, and the end after them."""
        judge = self.copy()
        return judge._matcher.try_consume_tokens([*ids]) == len(ids) and judge.mask() >> END & 1 == 1

    def answer(self, rng: random.Random) -> list[int]:
        """A random complete JSON text, or rest of one: about 60 bytes, and what it takes to end it then."""
        judge = self.copy()
        made: list[int] = []
        while True:
            hurry = len(made) > 60
            allowed = judge.next()
            if END in allowed and (hurry or len(allowed) == 1 or rng.random() < 0.4):
                return made
            ids = sorted(allowed - {END})
            made += rng.choices(ids, [_weight(id, hurry=hurry) for id in ids])
            judge.take(made[-1])
            assert len(made) < 1000, bytes(made)


def _weight(id: int, *, hurry: bool) -> float:
    """Short answers, of few characters beyond ASCII."""
    if id in _CLOSING:
        return 100 if hurry else 20
    return 1 if id < 128 else 0.02


def spelled(text: str, controls: Mapping[str, int]) -> list[int]:
    """A text in bytes, and in control tokens where it spells them."""
    parts = enumerate(_CONTROL.split(text))
    return [id for i, part in parts for id in ([controls[part]] if i % 2 and controls else part.encode())]


def read(ids: Sequence[int]) -> list[Segment] | None:
    """What was made, as segments; None where a character is cut."""
    segments: list[Segment] = []
    text = b""
    try:
        for id in ids:
            if id < 256:
                text += bytes([id])
                continue
            segments += [Segment(text.decode(), False), Segment(_NAMES[id], True)]
            text = b""
        segments.append(Segment(text.decode(), False))
    except UnicodeDecodeError:
        return None
    return [segment for segment in segments if segment.text]
