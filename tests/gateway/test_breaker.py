"""A replica that fails is left alone, tried again ever more rarely, and comes back with one good answer."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.engines.upstream import Hung, Lost
from deepseek_api_compat.errors import (
    ConfigError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
    RateLimited,
)
from deepseek_api_compat.gateway.breaker import (
    Breaker,
    BreakerSettings,
    blames_replica,
    check_fallbacks,
    fallback_chain,
    is_gone,
)


@pytest.fixture
def breaker():
    return Breaker(BreakerSettings(failures=3, window=10, hold=1.0, longest_hold=5.0, patience=60.0))


def fail(breaker, now, times=1):
    for _ in range(times):
        given = breaker.admit(now)
        assert given is not None
        breaker.failed(given, now)


def test_failures_in_a_row_open_it(breaker):
    fail(breaker, 0.0, 2)
    assert breaker.state(0.0) == "closed"
    fail(breaker, 0.0)
    assert breaker.state(0.0) == "open"
    assert breaker.admit(0.5) is None
    assert (breaker.counts.failed, breaker.counts.refused, breaker.counts.opened) == (3, 1, 1)


def test_a_success_between_failures_keeps_it_closed(breaker):
    for _ in range(3):
        fail(breaker, 0.0, 2)
        for _ in range(3):
            breaker.succeeded(breaker.admit(0.0))
    assert breaker.state(0.0) == "closed"


def test_every_other_failure_opens_it_in_time(breaker):
    for _ in range(5):
        breaker.succeeded(breaker.admit(0.0))
        assert breaker.state(0.0) == "closed"
        fail(breaker, 0.0)
    assert breaker.state(0.0) == "open"


def test_answered_errors_open_it_only_when_they_are_half(breaker):
    for _ in range(5):
        breaker.succeeded(breaker.admit(0.0))
    for count in range(5):
        assert breaker.state(0.0) == "closed", count
        breaker.failed(breaker.admit(0.0), 0.0, gone=False)
    assert breaker.state(0.0) == "open"


def test_one_trial_closes_it(breaker):
    fail(breaker, 0.0, 3)
    assert breaker.state(1.0) == "half-open"
    trial = breaker.admit(1.0)
    assert breaker.admit(1.0) is None
    breaker.succeeded(trial)
    assert breaker.state(1.0) == "closed"
    fail(breaker, 1.0, 2)
    assert breaker.state(1.0) == "closed"


def test_failed_trials_hold_off_twice_as_long_up_to_a_limit(breaker):
    fail(breaker, 0.0, 3)
    now = 0.0
    for hold in (1.0, 2.0, 4.0, 5.0, 5.0):
        assert not breaker.admits(now + hold - 0.01)
        now += hold
        fail(breaker, now)
    fail(breaker, now + 5.0)
    breaker.succeeded(breaker.admit(now + 10.0))
    fail(breaker, now + 10.0, 3)
    assert breaker.admits(now + 11.0)


def test_a_thousand_failed_trials_are_no_overflow(breaker):
    fail(breaker, 0.0, 3)
    for trial in range(1, 2000):
        fail(breaker, 10.0 * trial)
    assert breaker.state(10.0 * 1999) == "open"


def test_what_was_sent_before_it_opened_tells_nothing(breaker):
    late = [breaker.admit(0.0), breaker.admit(0.0)]
    fail(breaker, 0.0, 3)
    breaker.failed(late[0], 0.9)
    breaker.succeeded(late[1])
    assert not breaker.admits(0.99)
    assert breaker.admits(1.0)
    assert breaker.counts.succeeded == 1


def test_a_trial_that_tells_nothing_makes_room_for_another(breaker):
    fail(breaker, 0.0, 3)
    breaker.dropped(breaker.admit(1.0))
    assert breaker.admit(1.0) is not None


def test_a_trial_of_which_nothing_is_heard_is_given_up(breaker):
    fail(breaker, 0.0, 3)
    lost = breaker.admit(1.0)
    assert breaker.admit(60.9) is None
    second = breaker.admit(61.0)
    assert second is not None
    breaker.failed(lost, 61.0)
    assert breaker.state(61.0) == "half-open"
    breaker.succeeded(second)
    assert breaker.state(61.0) == "closed"


@given(st.lists(st.tuples(st.sampled_from(["ok", "bad", "drop", "wait"]), st.floats(0, 3))))
def test_it_always_comes_to_a_trial_again(steps):
    breaker = Breaker()
    now, passes = 0.0, []
    for step, seconds in steps:
        now += seconds
        if (given := breaker.admit(now)) is not None:
            passes.append(given)
        if passes and step != "wait":
            given = passes.pop(0)
            if step == "ok":
                breaker.succeeded(given)
            elif step == "bad":
                breaker.failed(given, now)
            else:
                breaker.dropped(given)
    settings = breaker.settings
    assert breaker.admits(now + settings.longest_hold + settings.patience)


@pytest.mark.parametrize(
    ("error", "blamed", "gone"),
    [
        (EngineUnavailable("x"), True, True),
        (EngineTimeout("x"), True, True),
        (Lost("x"), True, True),
        (Hung("x"), True, True),
        (EngineFailed("x"), True, False),
        (InvalidRequest("x"), False, False),
        (RateLimited("x"), False, False),
    ],
)
def test_whose_fault_an_error_is(error, blamed, gone):
    assert (blames_replica(error), is_gone(error)) == (blamed, gone)


def test_the_chain_is_in_order_and_names_none_twice():
    table = {"a": ["b", "d"], "b": ["c"], "c": [], "d": ["c", "e"], "e": []}
    check_fallbacks(table)
    assert fallback_chain("a", table) == ["b", "c", "d", "e"]
    assert fallback_chain("e", table) == []


def test_a_circle_is_found_and_shown():
    with pytest.raises(ConfigError, match="b -> c -> b"):
        check_fallbacks({"a": ["b"], "b": ["c"], "c": ["b"]})
    with pytest.raises(ConfigError, match="a -> a"):
        check_fallbacks({"a": ["a"]})


def test_an_unknown_fallback_is_named():
    with pytest.raises(ConfigError, match="'b'"):
        check_fallbacks({"a": ["b"]})
