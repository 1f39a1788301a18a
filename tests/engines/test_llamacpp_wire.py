"""Requests to llama.cpp and its events, without a server."""

from __future__ import annotations

import time

import pytest

from deepseek_api_compat.engines.llamacpp_wire import EventReader, Held, completion_body, piece
from deepseek_api_compat.errors import EngineFailed, InvalidRequest
from deepseek_api_compat.protocol.job import Job, Sampling

TOKEN = (
    b'data: {"index":0,"content":" \xc3\xa9t\xc3\xa9","tokens":[260],"stop":false,"id_slot":-1,'
    b'"tokens_predicted":1,"tokens_evaluated":15}\n\n'
)
LAST = (
    b'data: {"content":"","tokens":[],"stop":true,"stop_type":"limit","tokens_predicted":2,'
    b'"tokens_evaluated":15,"timings/cache_n":14}\n\n'
)


def test_any_split_of_the_bytes_gives_the_same_events() -> None:
    data = TOKEN + b": ping\n\n" + TOKEN + LAST
    whole = EventReader().feed(data)
    assert [(event.content, event.tokens, event.stop) for event in whole] == [
        (" été", [260], False),
        (" été", [260], False),
        ("", [], True),
    ]
    for cut in range(len(data) + 1):
        reader = EventReader()
        assert reader.feed(data[:cut]) + reader.feed(data[cut:]) == whole
    reader = EventReader()
    assert [event for byte in data for event in reader.feed(bytes([byte]))] == whole


def test_ids_wait_for_their_text_with_their_probabilities() -> None:
    held = Held()
    probability = b',"completion_probabilities":[{"token":"x","logprob":-1.0}]}'
    data = TOKEN.replace(b"}", probability)
    first, second, third = EventReader().feed(data.replace(b'" \xc3\xa9t\xc3\xa9"', b'""') * 2 + data)
    assert held.keeps(first)
    assert held.keeps(second)
    assert not held.keeps(third)
    assert third.tokens == [260] * 3
    assert len(third.completion_probabilities or ()) == 3
    (last,) = EventReader().feed(LAST)
    assert not held.keeps(last)
    assert last.tokens == []


def test_last_piece_has_the_counts() -> None:
    (event,) = EventReader().feed(LAST)
    last = piece(event, None)
    assert last.finish == "length"
    assert (last.prompt_tokens, last.cached_tokens, last.completion_tokens) == (15, 14, 2)


@pytest.mark.parametrize(("stop_type", "finish"), [("eos", "stop"), ("word", "stop"), ("limit", "length")])
def test_finish(stop_type: str, finish: str) -> None:
    (event,) = EventReader().feed(LAST.replace(b"limit", stop_type.encode()))
    assert piece(event, None).finish == finish


def test_error_events() -> None:
    with pytest.raises(EngineFailed, match="out of luck"):
        EventReader().feed(b'data: {"error":{"code":500,"message":"out of luck","type":"server_error"}}\n\n')
    with pytest.raises(InvalidRequest, match="too odd"):
        EventReader().feed(b'data: {"error":{"code":400,"message":"too odd"}}\n\n')


@pytest.mark.parametrize("junk", [b"{", b'{"tokens":"x"}', b'{"content":"\xff"}', b"[]"])
def test_nonsense(junk: bytes) -> None:
    with pytest.raises(EngineFailed, match="can't be understood"):
        EventReader().feed(b"data: " + junk + b"\n\n")


def test_defaults_are_openai_s() -> None:
    body = completion_body(Job(prompt_ids=[1, 2], max_tokens=5))
    assert body["temperature"] == body["top_p"] == body["typical_p"] == body["repeat_penalty"] == 1.0
    assert body["top_k"] == body["min_p"] == body["repeat_last_n"] == 0
    assert body["samplers"] == ["penalties", "temperature", "top_p"]
    assert body["seed"] == -1
    assert body["logit_bias"] == []
    assert not {"n_probs", "grammar"} & set(body)


def test_frequency_penalty_spares_the_prompt() -> None:
    sampling = Sampling(frequency_penalty=0.5, logit_bias={7: 3.0, 8: -1.0})
    body = completion_body(Job(prompt_ids=[7, 7, 9], max_tokens=5, sampling=sampling))
    assert dict(body["logit_bias"]) == {7: 4.0, 8: -1.0, 9: 0.5}
    assert body["repeat_last_n"] == 8


def test_seed_never_means_random() -> None:
    for seed in (0, 0xFFFFFFFF, 2**63 - 1, -1):
        body = completion_body(Job(prompt_ids=[1], max_tokens=1, sampling=Sampling(seed=seed)))
        assert 0 <= body["seed"] < 0xFFFFFFFF


def test_many_events_are_read_in_linear_time() -> None:
    """2 us each on an idle machine; the bound is for a busy one."""
    data = TOKEN * 2000
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        pieces = [piece(event, None) for event in EventReader().feed(data)]
        best = min(best, time.perf_counter() - start)
    assert len(pieces) == 2000
    assert best / 2000 < 500e-6


def test_a_prompt_that_must_share_nothing_is_computed_as_a_whole() -> None:
    assert completion_body(Job([1], max_tokens=1))["cache_prompt"]
    assert not completion_body(Job([1], max_tokens=1, cache_salt="a"))["cache_prompt"]


def test_the_part_of_the_prompt_that_is_the_answer_keeps_its_frequency_penalty() -> None:
    job = Job([1, 1, 2, 2], max_tokens=1, sampling=Sampling(frequency_penalty=0.5), sent=2)
    assert completion_body(job)["logit_bias"] == [(1, 1.0)]
