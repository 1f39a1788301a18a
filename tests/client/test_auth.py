"""Temporary tokens made by the client: the service's own code reads them."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from deepseek_api_compat import AuthManager
from deepseek_api_compat.client import auth
from deepseek_api_compat.security import tokens

SECRET = "5f" * 32
KEY = "DSK-abc123def456-" + "x" * 43


class Clock:
    """Both clocks of the module under test."""

    def __init__(self) -> None:
        self.wall, self.steady = 1_800_000_000.5, 50.0

    def time(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def pass_(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(auth, "time", clock)
    return clock


def test_the_service_reads_it(clock: Clock) -> None:
    manager = AuthManager(KEY, SECRET, 600, models=["m"], networks=["10.0.0.0/8"], max_tokens=50)
    token = manager.generate_token().encode()
    claims = tokens.read(token)
    assert tokens.is_signed_by(token, SECRET)
    assert not tokens.is_signed_by(token, "5e" * 32)
    assert (claims.sub, claims.iat, claims.exp - claims.iat) == ("abc123def456", 1_800_000_000, 600)
    assert (claims.models, claims.networks, claims.max_tokens) == (("m",), ("10.0.0.0/8",), 50)
    tokens.check_times(claims, clock.wall)
    assert manager.generate_token().encode() != token


def test_the_seed_s_placeholders_make_a_token() -> None:
    token = AuthManager(api_key="DSK-XXXXXX", secret_key="YOUR_SECRET_KEY", expires_in=3600).generate_token()
    assert tokens.read(token.encode()).sub == "XXXXXX"


def test_a_token_is_kept_until_shortly_before_its_end(clock: Clock) -> None:
    manager = AuthManager(KEY, SECRET, 600)
    first = manager.token()
    clock.pass_(539)
    assert manager.token() == first
    clock.pass_(2)
    second = manager.token()
    assert second != first
    assert tokens.read(second.encode()).iat == int(clock.wall)


@pytest.mark.parametrize("jump", [-10.0, 600.0])
def test_a_wall_clock_that_jumps(clock: Clock, jump: float) -> None:
    manager = AuthManager(KEY, SECRET, 600)
    first = manager.token()
    clock.wall += jump
    assert manager.token() != first
    assert tokens.read(manager.token().encode()).iat == int(clock.wall)


def test_a_machine_that_slept(clock: Clock) -> None:
    """Its steady clock may have stood still."""
    manager = AuthManager(KEY, SECRET, 600)
    first = manager.token()
    clock.wall += 3600
    assert manager.token() != first


def test_a_short_life_has_a_short_margin(clock: Clock) -> None:
    manager = AuthManager(KEY, SECRET, 4)
    first = manager.token()
    clock.pass_(2.9)
    assert manager.token() == first
    clock.pass_(0.2)
    assert manager.token() != first


def test_many_threads_share_one_token() -> None:
    manager = AuthManager(KEY, SECRET)
    found: set[str] = set()
    threads = [threading.Thread(target=lambda: found.add(manager.token())) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"api_key": "sk-123"}, "must be a key of this service"),
        ({"api_key": "DSK-"}, "must be a key of this service"),
        ({"secret_key": ""}, "secret_key is empty"),
        ({"expires_in": 0}, "1 to 86400 seconds"),
        ({"expires_in": 90_000}, "1 to 86400 seconds"),
        ({"models": "deepseek-v3"}, "are lists"),
        ({"max_tokens": 0}, "at least 1"),
    ],
)
def test_what_no_token_may_have(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        AuthManager(**{"api_key": KEY, "secret_key": SECRET} | given)


def test_its_secret_does_not_show() -> None:
    assert SECRET not in repr(AuthManager(KEY, SECRET))
    assert "x" * 43 not in repr(AuthManager(KEY, SECRET))
