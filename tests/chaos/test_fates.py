"""The chaos test's own judgement: what is right passes, and what is not is seen."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections import Counter
from random import Random
from typing import Any

import pytest

from chaos import audit
from chaos.asks import MALFORMED, Ask, Asker
from chaos.exchange import Exchange
from chaos.fates import Fate, judge, relayed
from chaos.faults import faults
from chaos.load import Load
from fakes import token_language as language
from fakes.token_engine import Answer

ERROR = {"error": {"message": "no luck", "type": "server_error", "param": None, "code": "engine_failed"}}
COUNT = 5
USAGE = {"prompt_tokens": 7, "completion_tokens": COUNT, "total_tokens": 7 + COUNT}
RELAY = {"model": "relay", "max_tokens": COUNT, "stream": True}


def exchange(body: Any, fields: Any = RELAY, *, status: int = 200, end: Any = "complete") -> Exchange:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"x-request-id": "req-1"} if status else {}
    return Exchange(Ask(fields), 1.0, 2.0, end, status, headers, data)


def events(*documents: Any, done: bool = True) -> bytes:
    parts = [f"data: {json.dumps(one)}\n\n" for one in documents] + ["data: [DONE]\n\n"] * done
    return "".join(parts).encode()


def chunk(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}


RIGHT = [chunk(relayed(COUNT)), chunk("", "stop")]


def test_complete_answers() -> None:
    assert judge(exchange(events(*RIGHT))) == Fate("answered", completion=COUNT, seen=True)
    choice = {"index": 0, "message": {"content": relayed(COUNT)}, "finish_reason": "stop"}
    whole = judge(exchange({"choices": [choice], "usage": USAGE}, {**RELAY, "stream": False}))
    assert (whole.kind, whole.prompt, whole.completion) == ("answered", 7, COUNT)


def test_explicit_errors() -> None:
    assert judge(exchange(ERROR, status=502)).kind == "failed"
    assert judge(exchange(b"\n\n" + json.dumps(ERROR).encode(), {**RELAY, "stream": False})).kind == "failed"
    late = judge(exchange(b": keep-alive\n\n" + events(RIGHT[0], ERROR, done=False)))
    assert (late.kind, late.seen) == ("failed", True)
    assert judge(exchange(ERROR, status=429)).kind == "refused"
    assert judge(exchange(ERROR, b"{", status=400)).kind == "refused"


@pytest.mark.parametrize(
    "wrong",
    [
        exchange(events(*RIGHT, done=False)),
        exchange(events(*RIGHT)[:-1]),
        exchange(events(RIGHT[0])),
        exchange(events(chunk("r0 r2 "), RIGHT[1])),
        exchange(events(*RIGHT, chunk("more"))),
        exchange(events(RIGHT[0], ERROR, RIGHT[1])),
        exchange(events(*RIGHT, ERROR)),
        exchange(events(*RIGHT, {"choices": [], "usage": USAGE})),
        exchange(events(*RIGHT), {**RELAY, "stream_options": {"include_usage": True}}),
        exchange(events(*RIGHT), {**RELAY, "n": 2}),
        exchange(b"oops\n\n" + events(*RIGHT)),
        exchange(b"", status=0, end="silent"),
        exchange({"choices": []}, {**RELAY, "stream": False}),
        exchange(b"<html>", {**RELAY, "stream": False}),
        exchange(b"<html>", status=502),
        exchange(ERROR, status=500),
        exchange(ERROR, status=400),
        exchange({"error": "no luck"}, status=502),
        exchange(events(*RIGHT), b"{"),
    ],
)
def test_anything_else_is_wrong(wrong: Exchange) -> None:
    assert judge(wrong).kind == "wrong"


def test_connections_break_when_a_worker_dies_and_only_then() -> None:
    for began, ended, slow, kind in (
        (99.0, 100.5, False, "broken"),
        (80.0, 90.0, False, "wrong"),
        (99.0, 110.0, False, "wrong"),
        (99.0, 110.0, True, "broken"),
        (101.0, 102.0, True, "wrong"),
    ):
        load = Load(0, {}, 1, [100.0])
        found = Exchange(Ask(RELAY, slow=slow), began, ended, "broken")
        load._note(found)
        assert [fate.kind for _, fate in load.fates] == [kind]


STOPS: tuple[list[str], ...] = ([], ["ka "], ["ka lo"], ["🙂", "u n"], ["日"])


def answer(seed: int, order: str = "") -> tuple[list[int], language.Told, int]:
    dice = Random(seed)
    prompt = language.prompt([{"role": "user", "content": f"Say {seed} ka lo"}])
    stops, most = STOPS[seed % len(STOPS)], dice.randrange(1, 200)
    made = Answer({"prompt": prompt, "n_predict": most, "stop": stops})
    *_, last = found = list(made.events(lambda: order))
    finish = "length" if last["stop_type"] == "limit" else "stop"
    return (
        prompt,
        language.Told("".join(one["content"] for one in found) + made.held, finish, stops, most),
        len(made.ids),
    )


@pytest.mark.parametrize("order", ["", "wrong"])
def test_every_answer_of_the_fake_is_right_lies_included(order: str) -> None:
    for seed in range(200):
        prompt, told, made = answer(seed, order)
        assert language.check(prompt, told) == made


def test_an_answer_with_a_gap_a_repeat_or_an_early_end_is_not() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        prompt, told, _ = answer(seed)
        words = told.text.split(" ")
        if len(words) < 8 or words[3] == words[4]:
            continue
        for what, text in (
            ("gap", " ".join(words[:3] + words[4:])),
            ("repeat", " ".join(words[:4] + words[3:])),
            ("early", " ".join(words[:-4]) + " "),
        ):
            with pytest.raises(language.Wrong):
                language.check(prompt, told._replace(text=text))
            seen[what] += 1
        with pytest.raises(language.Wrong):
            language.check([*prompt, 300], told)
    assert min(seen.values()) > 50


def test_texts_and_ids() -> None:
    text = "ka lo x 🙂mi nu 日\n"
    assert language.decode(language.encode(text)) == text
    assert language.encode("ka ") == [260]
    assert language.encode("ka") == list(b"ka")


def test_one_seed_one_run() -> None:
    first, second = ([*itertools.islice(faults(Random("1 faults")), 50)] for _ in range(2))
    assert first == second
    assert first != [*itertools.islice(faults(Random("2 faults")), 50)]
    asks = [[Asker(Random(7)).next() for _ in range(2)] for _ in range(2)]
    assert asks[0] == asks[1]
    drawn = [ask for asker in [Asker(Random(3))] for _ in range(500) for ask in [asker.next()]]
    assert {ask.model for ask in drawn} == {"", "fake", "real", "relay"}
    assert {ask.body for ask in drawn if isinstance(ask.body, bytes)} <= set(MALFORMED)


REST = audit.Rest(Counter(worker=2), [10, 20, 20], [5, 6, 6], 7.0)


def test_what_is_left_behind_is_seen() -> None:
    assert audit.differences(REST, REST) == []
    # Kept connections are no leak.
    assert audit.differences(REST, REST._replace(sockets=[5, 9, 6])) == []
    for left in (
        REST._replace(processes=Counter(worker=2, zombie=1)),
        REST._replace(files=[11, 20, 20]),
        REST._replace(files=[10, 20, 21]),
        REST._replace(sockets=[5, 6, 7 + audit.KEPT]),
        REST._replace(tasks=8.0),
    ):
        assert len(audit.differences(REST, left)) == 1


def row(outcome: str, completion: int = 3) -> dict[str, Any]:
    return {"outcome": outcome, "prompt_tokens": 7, "completion_tokens": completion}


def test_a_row_fits_what_the_client_saw() -> None:
    told = Fate("answered", prompt=7, completion=3, seen=True)
    assert not audit._row_problem(told, row("ok"))
    assert not audit._row_problem(Fate("left"), None)
    assert not audit._row_problem(Fate("broken", seen=True), row("gateway_lost"))
    for fate, found in (
        (told, None),
        (told, row("ok", 4)),
        (told, row("engine_lost")),
        (Fate("failed", seen=True), None),
        (Fate("failed", seen=True), row("ok")),
        (Fate("left", seen=True), None),
        (Fate("refused"), row("error")),
        (Fate("broken", seen=True), row("cancelled_by_client")),
    ):
        assert audit._row_problem(fate, found)


def test_memory_that_grows_is_seen() -> None:
    watch = audit.MemoryWatch(0.0)
    watch.look([os.getpid()], time.monotonic())
    assert watch.grown([os.getpid()]) == []
    ballast = bytearray(b"x") * int(watch.first[os.getpid()] * 0.3)
    assert len(watch.grown([os.getpid()])) == 1
    del ballast
