"""What every token engine keeps, whatever computes behind it: `Contract`, which test classes inherit."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import NamedTuple

import pytest

from deepseek_api_compat.engines.base import ModelInfo, TokenEngine
from deepseek_api_compat.errors import ContextTooLong, InvalidRequest
from deepseek_api_compat.protocol.grammar import text as exactly
from deepseek_api_compat.protocol.job import Job, Piece, Sampling
from deepseek_api_compat.protocol.segment import Segment

GREEDY = Sampling(temperature=0.0)
SLOW = 60.0  # seconds that a loaded machine may take for what is short


class Subject(NamedTuple):
    """An engine under test.

    prompt: ids after which greedy output is the same each time, and is text that no token breaks off.
    control: a control token that the engine's model has.
    """

    engine: TokenEngine
    info: ModelInfo
    prompt: list[int]
    control: str


async def run(engine: TokenEngine, job: Job) -> list[Piece]:
    return [piece async for pieces in engine.stream(job) for piece in pieces]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [id for piece in pieces for id in piece.ids]


class Contract:
    """A class that inherits this has a fixture `subject`, which is a `Subject`."""

    length = 24  # tokens of the answers that are compared

    async def test_it_says_what_it_serves(self, subject: Subject) -> None:
        info = await subject.engine.info()
        assert info.context > self.length + len(subject.prompt)
        assert info.slots >= 1

    async def test_counts_and_the_end(self, subject: Subject) -> None:
        pieces = await run(subject.engine, Job(subject.prompt, self.length, GREEDY))
        assert [piece.finish for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        last = pieces[-1]
        assert last.finish == "length"
        assert last.prompt_tokens == len(subject.prompt)
        assert last.completion_tokens == len(ids_of(pieces)) == self.length
        assert 0 <= last.cached_tokens < len(subject.prompt)

    async def test_each_piece_has_its_ids_and_whole_characters(self, subject: Subject) -> None:
        """At each border between two pieces, the ids so far are the text so far."""
        pieces = await run(subject.engine, Job(subject.prompt, self.length, GREEDY))
        made = 0
        for piece in pieces:
            made += len(piece.ids)
            if piece.finish is None:
                so_far = pieces[: pieces.index(piece) + 1]
                assert await subject.engine.detokenize(ids_of(so_far)) == text_of(so_far)
        assert made == self.length

    async def test_a_job_and_the_ids_so_far_are_a_new_job(self, subject: Subject) -> None:
        pieces = await run(subject.engine, Job(subject.prompt, self.length, GREEDY))
        whole, at = ids_of(pieces), 0
        for piece in pieces[:-1]:
            at += len(piece.ids)
            if at in (5, 11) or at > self.length // 2:
                break
        job = Job(subject.prompt + whole[:at], self.length - at, GREEDY, sent=at)
        rest = await run(subject.engine, job)
        assert whole[:at] + ids_of(rest) == whole
        assert await subject.engine.detokenize(whole[:at]) + text_of(rest) == text_of(pieces)

    async def test_stop_strings(self, subject: Subject) -> None:
        whole = text_of(await run(subject.engine, Job(subject.prompt, self.length, GREEDY)))
        middle = len(whole) // 2
        stop = whole[middle : middle + 4]
        pieces = await run(subject.engine, Job(subject.prompt, self.length, GREEDY, stop=("never", stop)))
        assert text_of(pieces) == whole[: whole.index(stop)]
        assert pieces[-1].finish == "stop"
        assert pieces[-1].prompt_tokens == len(subject.prompt)

    async def test_logprobs(self, subject: Subject) -> None:
        for top in (0, 2):
            pieces = await run(subject.engine, Job(subject.prompt, 4, GREEDY, top_logprobs=top))
            found = [entry for piece in pieces for entry in piece.logprobs or []]
            assert len(found) == 4
            for entry in found:
                assert entry.logprob <= 0
                assert len(entry.top) == top
                assert entry.top == sorted(entry.top, key=lambda t: -t.logprob)
        plain = await run(subject.engine, Job(subject.prompt, 2, GREEDY))
        assert all(piece.logprobs is None for piece in plain)

    async def test_logit_bias(self, subject: Subject) -> None:
        wanted = subject.prompt[-1]
        sampling = Sampling(temperature=0.0, logit_bias={wanted: 100.0})
        assert ids_of(await run(subject.engine, Job(subject.prompt, 3, sampling))) == [wanted] * 3

    async def test_text_can_not_spell_a_control_token(self, subject: Subject) -> None:
        [control] = await subject.engine.encode([Segment(subject.control, True)])
        spelled = f"A {subject.control} B"
        ids = await subject.engine.encode(
            [Segment(subject.control, True), Segment(spelled, False), Segment(subject.control, True)]
        )
        assert (ids[0], ids[-1], ids.count(control)) == (control, control, 2)
        assert control not in await subject.engine.tokenize(spelled, special=False)
        assert control in await subject.engine.tokenize(spelled, special=True)
        assert spelled in await subject.engine.detokenize(ids)

    async def test_tokens_and_back(self, subject: Subject) -> None:
        sentence = "The sea, 漢字 and 😀"
        assert (
            await subject.engine.detokenize(await subject.engine.encode([Segment(sentence, False)]))
            == sentence
        )
        assert await subject.engine.encode([]) == []

    async def test_leaving_frees_the_slot(self, subject: Subject) -> None:
        """As often as it has slots: an engine that kept one busy would have none for the last."""
        endless = Sampling(temperature=0.0, logit_bias={subject.prompt[-1]: 100.0})
        most = subject.info.context - len(subject.prompt) - 8
        for _ in range(subject.info.slots):
            async with aclosing(subject.engine.stream(Job(subject.prompt, most, endless))) as stream:
                await stream.__anext__()
        made = await asyncio.wait_for(run(subject.engine, Job(subject.prompt, 2, GREEDY)), SLOW)
        assert len(ids_of(made)) == 2

    async def test_several_at_once(self, subject: Subject) -> None:
        job = Job(subject.prompt, 8, GREEDY)
        answers = await asyncio.gather(*(run(subject.engine, job) for _ in range(3)))
        assert [len(ids_of(pieces)) for pieces in answers] == [8] * 3
        assert all(pieces[-1].finish == "length" for pieces in answers)

    async def test_a_grammar(self, subject: Subject) -> None:
        assert subject.info.can.grammar
        pieces = await run(subject.engine, Job(subject.prompt, 16, GREEDY, grammar=exactly("[")))
        assert text_of(pieces).startswith("[")

    async def test_what_it_refuses(self, subject: Subject) -> None:
        with pytest.raises(ContextTooLong):
            await run(subject.engine, Job([*subject.prompt] * subject.info.context, 4))
        with pytest.raises(InvalidRequest):
            await run(subject.engine, Job([10**6], 4))
        assert len(ids_of(await run(subject.engine, Job(subject.prompt, 1, GREEDY)))) == 1
