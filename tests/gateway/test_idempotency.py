"""What is kept of answers, and for how long."""

from __future__ import annotations

import msgspec
import pytest

from deepseek_api_compat.errors import Conflict, InvalidRequest
from deepseek_api_compat.gateway import idempotency
from deepseek_api_compat.gateway.idempotency import Answers, Found, Place, Repeats
from deepseek_api_compat.security.keys import Principal

PLACE = Place("key", "once", "digest")
OWNER = Principal(id="id", name="name", role="user", index=0)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def answers(clock: Clock) -> Answers:
    return Answers(clock)


def test_the_answer_comes_again(answers: Answers) -> None:
    assert answers.begin(PLACE, 0) == Found("new")
    assert answers.begin(PLACE, 1) == Found("busy")
    answers.end(PLACE, "{}")
    assert answers.begin(PLACE, 1) == answers.begin(PLACE, 0) == Found("kept", "{}")


def test_another_request_under_the_key(answers: Answers) -> None:
    answers.begin(PLACE, 0)
    other = Place("key", "once", "other digest")
    assert answers.begin(other, 0) == Found("other")
    answers.end(PLACE, "{}")
    assert answers.begin(other, 0) == Found("other")
    assert answers.begin(Place("another key", "once", "other digest"), 0) == Found("new")


def test_what_failed_may_be_tried_again(answers: Answers) -> None:
    answers.begin(PLACE, 0)
    answers.end(PLACE, None)
    assert answers.begin(PLACE, 0) == Found("new")


def test_what_a_dead_worker_was_making_may_be_tried_again(answers: Answers) -> None:
    kept = Place("key", "kept", "digest")
    for place, worker in ((PLACE, 0), (Place("key", "other", "digest"), 1), (kept, 0)):
        answers.begin(place, worker)
    answers.end(kept, "{}")
    answers.left(0)
    assert answers.begin(PLACE, 1) == Found("new")
    assert answers.begin(Place("key", "other", "digest"), 0) == Found("busy")
    assert answers.begin(kept, 1) == Found("kept", "{}")
    answers.end(PLACE, "{}")
    answers.end(Place("key", "never begun", "digest"), "{}")
    assert answers.begin(Place("key", "never begun", "digest"), 0) == Found("new")


def test_answers_are_forgotten_in_time(answers: Answers, clock: Clock) -> None:
    answers.begin(Place("key", "in flight", "digest"), 0)
    answers.begin(PLACE, 0)
    answers.end(PLACE, "{}")
    clock.now = idempotency.KEPT_FOR - 1
    assert answers.begin(PLACE, 0).what == "kept"
    clock.now += 2
    assert answers.begin(PLACE, 0).what == "new"
    assert answers.begin(Place("key", "in flight", "digest"), 0).what == "busy"


def test_the_oldest_go_where_there_are_too_many(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "MOST_KEPT", 10)
    monkeypatch.setattr(idempotency, "LARGEST", 6)
    places = [Place("key", str(n), "digest") for n in range(4)]
    for place, answer in zip(places, ("aaaa", "bbbb", "too large", "cccc"), strict=True):
        answers.begin(place, 0)
        answers.end(place, answer)
    assert [answers.begin(place, 0).what for place in places] == ["new", "kept", "new", "kept"]


@pytest.mark.parametrize("key", [b"x" * 256, b"\xff", b"a\tb"])
async def test_what_is_no_key(key: bytes) -> None:
    with pytest.raises(InvalidRequest, match="1 to 255 printable"):
        await repeats(Found("new")).begin(OWNER, key, "/p", b"{}")


def repeats(found: Found) -> Repeats:
    async def begin(place: Place) -> Found:
        return found

    return Repeats(begin, lambda place, answer: None)


async def test_what_a_worker_makes_of_it() -> None:
    place, answer = await repeats(Found("new")).begin(OWNER, b"key", "/p", b"{}")
    assert (place.key, answer) == ("key", None)
    again, answer = await repeats(Found("kept", "[]")).begin(OWNER, b"key", "/p", b"{}")
    assert (again, answer) == (place, b"[]")
    for path, body in (("/q", b"{}"), ("/p", b"{ }")):
        other, _ = await repeats(Found("new")).begin(OWNER, b"key", path, body)
        assert other.digest != place.digest
    with pytest.raises(Conflict) as caught:
        await repeats(Found("busy")).begin(OWNER, b"key", "/p", b"{}")
    assert (caught.value.status, caught.value.retry_after) == (409, 1.0)
    with pytest.raises(InvalidRequest) as refused:
        await repeats(Found("other")).begin(OWNER, b"key", "/p", b"{}")
    assert refused.value.code == "idempotency_key_reused"


async def test_who_may_do_less_by_now_has_no_answer_of_before() -> None:
    place, _ = await repeats(Found("new")).begin(OWNER, b"key", "/p", b"{}")
    for less in ({"models": frozenset({"m"})}, {"models": frozenset()}, {"max_tokens": 5}, {"id": "other"}):
        narrowed = msgspec.structs.replace(OWNER, **less)
        other, _ = await repeats(Found("new")).begin(narrowed, b"key", "/p", b"{}")
        assert other.owner != place.owner


def test_what_is_no_text_is_not_kept() -> None:
    kept: list[str | None] = []

    async def begin(place: Place) -> Found:
        return Found("new")

    for answer in (b"{}", b"\xff", b"x" * (idempotency.LARGEST + 1), None):
        Repeats(begin, lambda place, text: kept.append(text)).end(PLACE, answer)
    assert kept == ["{}", None, None, None]
