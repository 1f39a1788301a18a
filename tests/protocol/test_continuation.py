"""An answer that several engines made, one after the other, is one answer."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.protocol.continuation import Continuation
from deepseek_api_compat.protocol.grammar import Grammar, Json, Seq, Until, text
from deepseek_api_compat.protocol.job import Job, Piece, Sampling
from deepseek_api_compat.protocol.segment import Segment

PROMPT = [1, 2, 3]


def lives(job: Job, cuts: list[int], answer: list[int]) -> tuple[list[Piece], list[Job]]:
    """What engines that die after so many tokens each, and a last one that lives, make of a job."""
    continuation = Continuation(job)
    pieces: list[Piece] = []
    jobs = []
    for cut in [*cuts, None]:
        rest = continuation.rest()
        jobs.append(rest)
        made = answer[len(continuation.ids) :]
        for id in made[:cut]:
            pieces += continuation.take([Piece([id], f"<{id}>")])
        if cut is None:
            counts = {"prompt_tokens": len(rest.prompt_ids), "completion_tokens": len(made)}
            last = Piece(finish="stop", cached_tokens=len(rest.prompt_ids) - 1, **counts)
            pieces += continuation.take([last])
    return pieces, jobs


@given(st.lists(st.integers(0, 5), max_size=5), st.lists(st.integers(10, 99), min_size=1, max_size=40))
def test_no_token_is_missing_or_twice_and_the_counts_are_those_of_one_answer(cuts, answer):
    pieces, jobs = lives(Job(PROMPT, max_tokens=100), cuts, answer)
    assert [id for piece in pieces for id in piece.ids] == answer
    assert (pieces[-1].prompt_tokens, pieces[-1].completion_tokens) == (3, len(answer))
    assert pieces[-1].cached_tokens <= 3
    for job in jobs:
        assert job.prompt_ids == PROMPT + answer[: job.sent]
        assert len(job.prompt_ids) + job.max_tokens == 103


def test_a_seed_goes_on_with_other_numbers():
    seeded = Job(PROMPT, max_tokens=100, sampling=Sampling(seed=2**63 - 1))
    _, jobs = lives(seeded, [2, 0], [10, 11, 12])
    assert [job.sampling.seed for job in jobs] == [2**63 - 1, 1, 1]


def test_only_the_end_was_missing():
    continuation = Continuation(Job(PROMPT, max_tokens=2))
    assert continuation.ended() is None
    continuation.take([Piece([10], "a"), Piece([11], "b")])
    assert continuation.ended() == Piece(finish="length", prompt_tokens=3, completion_tokens=2)


CONTROLS = {"<end of thought>": 7}
THOUGHT = Seq((Until((Segment("<end of thought>", True),)), text("abcd")))


def rest_of(grammar: Grammar, *pieces: Piece) -> Grammar | None:
    continuation = Continuation(Job(PROMPT, max_tokens=20, grammar=grammar))
    continuation.take([*pieces])
    assert continuation.can_continue(CONTROLS)
    assert continuation.rest().prompt_ids == [*PROMPT, *continuation.ids]
    return continuation.rest().grammar


def test_a_grammar_goes_on_where_it_was():
    assert rest_of(text("abcd"), Piece([10], "a"), Piece([11, 12], "bc")) == text("d")
    assert rest_of(THOUGHT, Piece([10], "Hm.")) == THOUGHT


def test_a_control_token_is_known_by_its_id():
    """Its spelling is text, and does not end the thought; it may show in the text of the answer or not."""
    spelt = Piece([10, 11], "<end of thought>")
    assert rest_of(THOUGHT, spelt, Piece([12], "x")) == THOUGHT
    assert rest_of(THOUGHT, spelt, Piece([7], "<end of thought>"), Piece([10], "a")) == text("bcd")
    assert rest_of(THOUGHT, Piece([7]), Piece([10], "ab")) == text("cd")


def test_a_grammar_goes_on_after_several_deaths():
    continuation = Continuation(Job(PROMPT, max_tokens=20, grammar=text("abcd")))
    for begun, rest in (("a", "bcd"), ("bc", "d")):
        assert continuation.can_continue({})
        continuation.rest()
        continuation.take([Piece([10], begun)])
        assert continuation.can_continue({})
        assert continuation.rest().grammar == text(rest)


def test_nothing_was_missing_of_a_grammar():
    continuation = Continuation(Job(PROMPT, max_tokens=20, grammar=text("ab")))
    continuation.take([Piece([10], "a"), Piece([11], "b")])
    assert continuation.can_continue({})
    assert continuation.ended() == Piece(finish="stop", prompt_tokens=3, completion_tokens=2)


@pytest.mark.parametrize(
    ("grammar", "sent"),
    [
        (text("ab"), "b"),  # an engine that did not keep to it
        (Json({"type": "string", "pattern": "(?<=a)b"}), '"a'),  # an expression that only engines read
    ],
)
def test_a_rest_that_can_t_be_told(grammar: Grammar, sent: str):
    continuation = Continuation(Job(PROMPT, max_tokens=20, grammar=grammar))
    assert continuation.can_continue({}), "nothing has been sent"
    continuation.take([Piece([10], sent)])
    assert not continuation.can_continue({})
