"""Sliding windows over shared cells: at most `limit` in any `span` seconds, whoever asks and however.

A window is a ring of entries, each a time and an amount. An entry leaves when all of it is older than the
span, so that no `span` seconds ever hold more than the limit. Up to EXACT, each request has an entry of its
own. Beyond that, neighbours share one: at most 2 / ENTRIES of the limit and of the span, which is what may
leave too late. So an overloaded window admits between 99.2 % and 100 % of its limit.

A low rate would lose more to the time between a place that becomes free and the request that takes it. So a
request which found the window full before counts from when its place became free, but at most span / limit
back. That makes up to one more than the limit in a span, and none more from the start on.

    head, tail       entries head .. tail - 1 are alive, at position modulo ENTRIES
    total            sum of their amounts
    opened           time of the first amount in the newest entry (float)
    freed            time at which a full window got room that nobody took yet, or 0 (float)
    ENTRIES x time   of the last amount in the entry (float)
    ENTRIES x amount

Nothing here takes a lock or reads a clock: callers do.
"""

from __future__ import annotations

from math import inf

import msgspec

from deepseek_api_compat.gateway.shared import SharedMemory

ENTRIES = 256  # a power of two
EXACT = ENTRIES // 2
HEAD, TAIL, TOTAL, OPENED, FREED, TIMES = range(6)
AMOUNTS = TIMES + ENTRIES
CELLS = AMOUNTS + ENTRIES
_MASK = ENTRIES - 1
_TICK = 1e-6  # seconds; what floating-point times may be off


class Window(msgspec.Struct, frozen=True):
    """One limit of somebody: at most `limit` in any `span` seconds.

    `place` is the ring's first cell, counted from that of its account; `code`, `rate` and `unit` ("requests
    per second") are for the refusal. An entry takes neighbours until it holds `shared` or is `apart` seconds
    old; `credit` is how many seconds a request may count back.
    """

    place: int
    limit: int
    span: float
    code: str
    unit: str
    rate: float
    shared: int
    apart: float
    credit: float


def window(place: int, limit: int, span: float, code: str, unit: str, rate: float) -> Window:
    shared, credit = (1, span / limit) if limit <= EXACT else (2 * limit // ENTRIES, 0.0)
    return Window(place, limit, span, code, unit, rate, shared, span * (2 / ENTRIES), credit)


class Windows:
    """The arithmetic on the rings in `memory`; `base` is the first cell of one."""

    def __init__(self, memory: SharedMemory) -> None:
        self._ints = memory.ints
        self._floats = memory.floats

    def wait(self, base: int, window: Window, amount: int, now: float) -> float:
        """Seconds until `amount` fits, 0.0 if it fits now, infinity if it is over the limit by itself."""
        ints, floats, span = self._ints, self._floats, window.span
        head, tail, total = ints[base], ints[base + TAIL], ints[base + TOTAL]
        first = head
        before = now - span + _TICK  # what is as old as this has left
        while head < tail:
            cell = base + TIMES + (head & _MASK)
            held = ints[cell + ENTRIES]
            if held and floats[cell] > before:
                break
            if held and total >= window.limit:
                floats[base + FREED] = floats[cell] + span
            total -= held
            head += 1
        if head != first:
            ints[base] = head
            ints[base + TOTAL] = total
        over = total + amount - window.limit
        if over <= 0:
            return 0.0
        return inf if amount > window.limit else self._until_left(base, over) + span - now

    def take(self, base: int, window: Window, now: float) -> int:
        """Count one if it fits. Returns its entry, or -1: `wait` and `add` in one, for the hot path."""
        ints, floats = self._ints, self._floats
        head, tail, total = ints[base], ints[base + TAIL], ints[base + TOTAL]
        cell = base + TIMES + (head & _MASK)
        if head < tail and (floats[cell] <= now - window.span + _TICK or not ints[cell + ENTRIES]):
            self.wait(base, window, 1, now)
            total = ints[base + TOTAL]
        if total >= window.limit:
            return -1
        if window.shared > 1 or tail - head >= ENTRIES:
            return self.add(base, window, 1, now)
        if floats[base + FREED]:
            now = self._since_freed(base, window, now)
        ints[base + TOTAL] = total + 1
        cell = base + TIMES + (tail & _MASK)
        floats[cell] = now
        ints[cell + ENTRIES] = 1
        ints[base + TAIL] = tail + 1
        return tail

    def add(self, base: int, window: Window, amount: int, now: float) -> int:
        """Count `amount`, whether it fits or not. Returns the entry, for `correct`."""
        ints, floats = self._ints, self._floats
        head, tail = ints[base], ints[base + TAIL]
        if floats[base + FREED]:
            now = self._since_freed(base, window, now)
        ints[base + TOTAL] += amount
        if tail > head and self._joins(base, window, head, tail, now):
            cell = base + TIMES + (tail - 1 & _MASK)
            floats[cell] = now
            ints[cell + ENTRIES] += amount
            return tail - 1
        cell = base + TIMES + (tail & _MASK)
        floats[cell] = floats[base + OPENED] = now
        ints[cell + ENTRIES] = amount
        ints[base + TAIL] = tail + 1
        return tail

    def correct(self, base: int, entry: int, less: int) -> None:
        """Take `less` out of an entry, if it is still there."""
        ints = self._ints
        if ints[base] <= entry < ints[base + TAIL]:
            cell = base + AMOUNTS + (entry & _MASK)
            less = min(less, ints[cell])
            ints[cell] -= less
            ints[base + TOTAL] -= less

    def repair(self, base: int) -> None:
        """Sum up anew, after somebody died between two writes."""
        ints = self._ints
        alive = range(ints[base], ints[base + TAIL])
        ints[base + TOTAL] = sum(ints[base + AMOUNTS + (entry & _MASK)] for entry in alive)

    def reset(self, base: int, window: Window, now: float) -> float:
        """Seconds until all of the limit is there again."""
        head, tail = self._ints[base], self._ints[base + TAIL]
        if head == tail:
            return 0.0
        return max(0.0, self._floats[base + TIMES + (tail - 1 & _MASK)] + window.span - now)

    def _since_freed(self, base: int, window: Window, now: float) -> float:
        """When a request counts that takes the place of one which left."""
        freed = self._floats[base + FREED]
        self._floats[base + FREED] = 0.0
        return max(freed, now - window.credit)

    def _until_left(self, base: int, over: int) -> float:
        """Time of the entry with which `over` will have left."""
        ints = self._ints
        entry, newest = ints[base] - 1, ints[base + TAIL] - 1
        while over > 0 and entry < newest:
            entry += 1
            over -= ints[base + AMOUNTS + (entry & _MASK)]
        return self._floats[base + TIMES + (entry & _MASK)]

    def _joins(self, base: int, window: Window, head: int, tail: int, now: float) -> bool:
        """Whether what comes now belongs to the newest entry."""
        if tail - head >= ENTRIES:
            return True
        if now - self._floats[base + OPENED] >= window.apart:
            return False
        held = self._ints[base + AMOUNTS + (tail - 1 & _MASK)]
        # Many small amounts, as settlements leave them, must not fill the ring before its span is over.
        return held < window.shared or (tail - head >= EXACT and window.limit > EXACT)
