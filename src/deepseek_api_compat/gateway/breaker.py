"""When a replica gets no requests for a while, and when another model answers instead.

A breaker is one of three:

    closed      requests go through; `failures` in a row, or half of the last `window`, open it
    open        none does until the hold-off is over: `hold` seconds, twice as many after each failed trial
    half-open   one does, the trial: if it succeeds the breaker closes, if it fails it opens again

Only requests count, not probes: an engine can be healthy and wrong. Everything is told the time, in seconds
of one monotonic clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from deepseek_api_compat.engines.upstream import Lost
from deepseek_api_compat.errors import (
    ApiError,
    ConfigError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
)


class BreakerSettings(msgspec.Struct, frozen=True):
    """failures: in a row, that open it. window: of so many outcomes, the last ones, half do.

    hold, longest_hold: seconds. patience: seconds after which a trial of which nothing was heard is given up,
    so that a lost one doesn't keep the replica out for ever; a generation may take long, hence minutes.
    """

    failures: int = 3
    window: int = 20
    hold: float = 1.0
    longest_hold: float = 60.0
    patience: float = 600.0


@dataclass(slots=True)
class Counts:
    """Since the start; `refused` are the requests that were not let through, `opened` how often it opened."""

    succeeded: int = 0
    failed: int = 0
    refused: int = 0
    opened: int = 0


@dataclass(slots=True)
class Breaker:
    """One replica's. Whoever is admitted says how it went with the pass it got, once, or drops it."""

    settings: BreakerSettings = field(default_factory=BreakerSettings)
    counts: Counts = field(default_factory=Counts)
    _failures: int = 0
    _outcomes: deque[bool] = field(default_factory=deque)
    _opened: int = 0  # since it was last closed
    _until: float = -math.inf  # the hold-off's end
    _trial: float | None = None  # since when there is one
    # Passes of an earlier generation tell of the time before the breaker opened or closed.
    _generation: int = 0

    def state(self, now: float) -> str:
        """closed, open or half-open."""
        if not self._opened:
            return "closed"
        return "open" if now < self._until else "half-open"

    def admits(self, now: float) -> bool:
        """Whether `admit` would let a request through."""
        if not self._opened:
            return True
        return now >= self._until and not self._on_trial(now)

    def admit(self, now: float) -> int | None:
        """A pass for one request, None if it must not be sent."""
        if not self.admits(now):
            self.counts.refused += 1
            return None
        if self._opened:
            self._generation += 1  # what an abandoned trial says no longer counts
            self._trial = now
        return self._generation

    def succeeded(self, given: int) -> None:
        """The request with this pass was answered: the first token is enough, long before its end."""
        self.counts.succeeded += 1
        if given != self._generation:
            return
        if self._opened:
            self._close()
        self._failures = 0
        self._note(True)

    def failed(self, given: int, now: float, *, gone: bool = True) -> None:
        """It failed in a way that may be the replica's fault (`blames_replica`).

        `gone`: there was no answer, or it broke off (`is_gone`). An error that was answered may be the
        request's fault: one client must not open a breaker with three of them, but half of all must.
        """
        self.counts.failed += 1
        if given == self._generation:
            self._fail(now, gone)

    def dropped(self, given: int) -> None:
        """It ended without telling anything: the client left, or the request was wrong."""
        if given == self._generation:
            self._trial = None

    def _fail(self, now: float, gone: bool = True) -> None:
        self._failures += gone
        self._note(False)
        if self._opened or self._failures >= self.settings.failures or self._half_failed():
            self._open(now)

    def _half_failed(self) -> bool:
        outcomes = self._outcomes
        return len(outcomes) >= self.settings.window and 2 * outcomes.count(False) >= len(outcomes)

    def _note(self, good: bool) -> None:
        self._outcomes.append(good)
        if len(self._outcomes) > self.settings.window:
            self._outcomes.popleft()

    def _open(self, now: float) -> None:
        self.counts.opened += 1
        self._opened += 1
        self._until = now + self._hold_off()
        self._generation += 1
        self._trial = None

    def _close(self) -> None:
        self._opened = 0
        self._trial = None
        self._generation += 1
        self._outcomes.clear()

    def _hold_off(self) -> float:
        # The exponent is bounded, as 2.0 ** 2000 is an error.
        return min(self.settings.longest_hold, self.settings.hold * 2.0 ** min(self._opened - 1, 60))

    def _on_trial(self, now: float) -> bool:
        return self._trial is not None and now - self._trial < self.settings.patience


def blames_replica(error: ApiError) -> bool:
    """Whether an error may be the replica's fault: `failed`. Others tell nothing: `dropped`."""
    return isinstance(error, (EngineUnavailable, EngineTimeout, EngineFailed))


def is_gone(error: ApiError) -> bool:
    """Whether the replica could not be reached, hangs or broke off; else it has answered, with an error."""
    return blames_replica(error) and (not isinstance(error, EngineFailed) or isinstance(error, Lost))


def fallback_chain(model: str, fallbacks: Mapping[str, Sequence[str]]) -> list[str]:
    """The models to try after `model`, in this order: its own, each followed by its own in turn. None twice.

    `fallbacks` is checked (`check_fallbacks`).
    """
    order: dict[str, None] = {}
    waiting = list(reversed(fallbacks.get(model, ())))
    while waiting:
        name = waiting.pop()
        if name not in order and name != model:
            order[name] = None
            waiting += reversed(fallbacks.get(name, ()))
    return list(order)


def check_fallbacks(fallbacks: Mapping[str, Sequence[str]]) -> None:
    """`fallbacks` has every model by its name, and to which it falls back.

    Raises ConfigError if one is unknown, or if a model would come back to itself; the message shows the way.
    """
    done: set[str] = set()
    for model in fallbacks:
        _walk(model, fallbacks, [], done)


def _walk(model: str, fallbacks: Mapping[str, Sequence[str]], path: list[str], done: set[str]) -> None:
    if model in path:
        way = " -> ".join([*path[path.index(model) :], model])
        raise ConfigError(f"Fallbacks go in a circle: {way}.")
    if model in done:
        return
    for name in fallbacks[model]:
        if name not in fallbacks:
            raise ConfigError(f"Model {model!r} falls back to {name!r}, which is not configured.")
        _walk(name, fallbacks, [*path, model], done)
    done.add(model)
