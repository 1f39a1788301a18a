"""Requests per second for each key, exact over all workers of one machine.

The generic cell rate algorithm (GCRA, ITU-T I.371): one number per key, its theoretical arrival time,
kept in shared memory. A refused request changes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import msgspec

from deepseek_api_compat.errors import RateLimited
from deepseek_api_compat.gateway.shared import SharedMemory

MAX_KEYS = 65536


class Allowance(msgspec.Struct, frozen=True):
    """What a key has left: whole requests, and seconds until all are back."""

    limit: int
    remaining: int
    reset: float


class OverRate(RateLimited):
    """Refused by a key's rate; `allowance` is what headers tell the client."""

    def __init__(self, message: str, allowance: Allowance, retry_after: float) -> None:
        super().__init__(message, retry_after=retry_after)
        self.allowance = allowance


class RateLimiter:
    """Failure policy: shared memory of one machine can't be away, so there is none."""

    def __init__(
        self,
        memory: SharedMemory,
        offset: int,
        *,
        default_rps: float,
        burst_seconds: float,
        alone: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Cells `offset .. offset + MAX_KEYS` of `memory` hold one arrival time for each key.

        `alone`: no other process counts here, so no lock is needed.
        """
        self._times = memory.floats
        self._offset = offset
        self._default = default_rps
        self._burst = burst_seconds
        self._lock: AbstractContextManager[object] = nullcontext() if alone else memory
        self._clock = clock  # CLOCK_MONOTONIC is one clock for all processes of a machine

    def admit(self, index: int, rps: float | None) -> Allowance | None:
        """Count one request of key number `index`; None where the key has no limit (rps 0).

        Raises OverRate, with the seconds to wait, when the key is over its rate.
        """
        rate = self._default if rps is None else rps
        if rate <= 0:
            return None
        interval = 1.0 / rate
        tolerance = max(self._burst, interval)
        cell = self._offset + index % MAX_KEYS
        with self._lock:
            now = self._clock()
            arrival = max(self._times[cell], now) + interval
            ahead = arrival - now
            allowed = ahead <= tolerance + 1e-9
            if allowed:
                self._times[cell] = arrival
        limit = int(tolerance * rate + 1e-6)
        if not allowed:
            wait = ahead - tolerance
            message = f"This key may send {rate:g} requests per second. Retry in {wait:.2f} s."
            raise OverRate(message, Allowance(limit, 0, ahead - interval), retry_after=wait)
        return Allowance(limit, int((tolerance - ahead) * rate + 1e-6), ahead)
