"""One answer over the lives of several engines: what has come of it, and the job that makes the rest.

The ids that were passed on go behind the prompt, and the engine goes on from there as if it had made them.
So the text has no gap and no repeat, and no character is cut: a piece has whole characters, and ids only
together with their text. `Job.sent` tells the engine which ids of the prompt are the answer's. An engine
begins every grammar at its root, so it is given the grammar of the rest (see `residual`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import msgspec

from deepseek_api_compat.protocol.grammar import Exactly
from deepseek_api_compat.protocol.job import Job, Piece, Sampling
from deepseek_api_compat.protocol.residual import NotItsBeginning, residual, segments
from deepseek_api_compat.protocol.segment import Segment


class Continuation:
    """What engines have made of one job so far."""

    __slots__ = ("_grammar", "_inherited", "_job", "_texts", "cached", "ids")

    def __init__(self, job: Job) -> None:
        self.ids: list[int] = []
        self.cached = 0  # tokens of the last prompt that the engine had in its cache, at the end
        self._job = job
        self._inherited = 0  # ids that the engine at work did not make itself
        self._grammar = job.grammar  # of what engines have still to make
        self._texts: list[tuple[list[int], str]] = []  # of the pieces, under a grammar

    @property
    def begun(self) -> bool:
        return bool(self.ids)

    def can_continue(self, controls: Mapping[str, int]) -> bool:
        """Whether another engine can make the rest: not if its grammar can't be told.

        controls: ids of the model's control tokens, by spelling. This takes a few milliseconds; with the
        worst schemas, a tenth of a second.
        """
        if self._job.grammar is None or not self._texts:
            return True
        spellings = {id: spelling for spelling, id in controls.items()}
        try:
            rest = residual(self._job.grammar, [*self._segments(spellings)])
        except NotItsBeginning:  # the engine did not keep to it
            return False
        self._grammar = rest
        return rest is not None

    def take(self, pieces: list[Piece]) -> list[Piece]:
        """Note what has come; the same pieces, with the counts of the whole answer on the last."""
        ids = self.ids
        for piece in pieces:
            if piece.ids:
                ids += piece.ids
        if self._grammar is not None:
            self._texts += [(piece.ids, piece.text) for piece in pieces]
        last = pieces[-1]
        if last.finish is None:
            return pieces
        self.cached = last.cached_tokens
        return [*pieces[:-1], self._whole(last)] if self._inherited else pieces

    def rest(self) -> Job:
        """The job of what is still to be made: at first the whole one."""
        job, sent = self._job, len(self.ids)
        self._inherited = sent
        if not sent:
            return job
        return msgspec.structs.replace(
            job,
            prompt_ids=job.prompt_ids + self.ids,
            max_tokens=job.max_tokens - sent,
            sampling=_further(job.sampling, sent),
            grammar=self._grammar,
            sent=sent,
        )

    def ended(self) -> Piece | None:
        """The last piece, if an engine died when only that was missing: there is no token left to make."""
        if len(self.ids) >= self._job.max_tokens:
            finish = "length"
        elif isinstance(self._grammar, Exactly) and not self._grammar.segments:
            finish = "stop"
        else:
            return None
        return Piece(finish=finish, prompt_tokens=len(self._job.prompt_ids), completion_tokens=len(self.ids))

    def _segments(self, spellings: Mapping[int, str]) -> Iterator[Segment]:
        for ids, text in self._texts:
            yield from segments(ids, text, spellings)

    def _whole(self, last: Piece) -> Piece:
        # What was cached of the ids that were sent before is no part of the prompt that was asked.
        prompt = last.prompt_tokens - self._inherited
        return msgspec.structs.replace(
            last,
            prompt_tokens=prompt,
            cached_tokens=min(last.cached_tokens, prompt),
            completion_tokens=last.completion_tokens + self._inherited,
        )


def _further(sampling: Sampling, sent: int) -> Sampling:
    """The same distribution, and with a seed other random numbers than those that are used up."""
    if sampling.seed is None:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + sent) % 2**63)
