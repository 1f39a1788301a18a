"""What engines keep, whatever computes behind them; test classes inherit it.

`Spoken` is kept by every engine, in texts: also by a chat upstream, any OpenAI-compatible server behind the
relay. `Contract` is what token engines keep beyond that. It can't be asked of a chat upstream:

- ids, and which text is whose: it tells none. So an answer that has begun goes on only where messages can be
  continued (tests/service/test_relay_failover.py).
- stop strings, logprobs, logit_bias, grammars: the request's fields go up as they are, and are its promise.
- tokens and back, and what text can spell: it renders prompts itself.
- the context and the slots: it alone knows them, and refuses what is too long in its own words.

How they fail is the same for all, and in test_contract.py: each error there has one type, whatever engine it
comes from.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import NamedTuple, Protocol

import pytest

from deepseek_api_compat.engines.base import ModelInfo, TokenEngine
from deepseek_api_compat.errors import ContextTooLong, EngineUnavailable, InvalidRequest
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


class Counts(NamedTuple):
    """Tokens."""

    prompt: int
    completion: int
    cached: int


class Speaker(Protocol):
    """An engine of any kind, as it is heard: always by the same prompt, with greedy sampling."""

    def say(self, most: int) -> AsyncGenerator[str | Counts, None]:
        """The texts of an answer of up to so many tokens, as they come; then what it counted."""
        ...

    async def close(self) -> None: ...


class Tokens:
    """A token engine as a speaker."""

    def __init__(self, engine: TokenEngine, prompt: list[int]) -> None:
        self._engine = engine
        self._prompt = prompt

    async def say(self, most: int) -> AsyncGenerator[str | Counts, None]:
        async with aclosing(self._engine.stream(Job(self._prompt, most, GREEDY))) as groups:
            async for pieces in groups:
                yield text_of(pieces)
                last = pieces[-1]
        assert last.finish is not None
        yield Counts(last.prompt_tokens, last.completion_tokens, last.cached_tokens)

    async def close(self) -> None:
        await self._engine.close()


async def heard(speaker: Speaker, most: int) -> tuple[str, Counts]:
    """A whole answer."""
    *texts, counts = [part async for part in speaker.say(most)]
    assert isinstance(counts, Counts)
    assert all(isinstance(text, str) for text in texts)
    return "".join(map(str, texts)), counts


async def run(engine: TokenEngine, job: Job) -> list[Piece]:
    return [piece async for pieces in engine.stream(job) for piece in pieces]


def text_of(pieces: Sequence[Piece]) -> str:
    return "".join(piece.text for piece in pieces)


def ids_of(pieces: Sequence[Piece]) -> list[int]:
    return [id for piece in pieces for id in piece.ids]


class Spoken:
    """A class that inherits this has a fixture `speaker`, which is a `Speaker`."""

    length = 24  # tokens of the answers that are compared
    long = 240  # tokens of those that are given up

    async def test_it_says_the_same_again_and_counts_it(self, speaker: Speaker) -> None:
        text, counts = await heard(speaker, self.length)
        assert text
        assert counts.completion == self.length
        assert 0 <= counts.cached < counts.prompt
        again, counted = await heard(speaker, self.length)
        assert again == text
        assert counted[:2] == counts[:2]

    async def test_several_at_once(self, speaker: Speaker) -> None:
        answers = await asyncio.gather(*(heard(speaker, 8) for _ in range(3)))
        assert [counts.completion for _, counts in answers] == [8] * 3

    async def test_who_leaves_does_not_disturb(self, speaker: Speaker) -> None:
        text, _ = await heard(speaker, self.length)
        for _ in range(3):
            async with aclosing(speaker.say(self.long)) as stream:
                await stream.__anext__()
        assert (await heard(speaker, self.length))[0] == text

    async def test_closing_it_ends_what_it_says(self, speaker: Speaker) -> None:
        async with aclosing(speaker.say(self.long)) as stream:
            await stream.__anext__()
            await asyncio.wait_for(speaker.close(), SLOW)
            with pytest.raises(EngineUnavailable):
                async for _ in stream:
                    pass
        with pytest.raises(EngineUnavailable):
            await heard(speaker, 1)


class Contract(Spoken):
    """A class that inherits this has a fixture `subject`, which is a `Subject`."""

    @pytest.fixture
    def speaker(self, subject: Subject) -> Speaker:
        return Tokens(subject.engine, subject.prompt)

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
