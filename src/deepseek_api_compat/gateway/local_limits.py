"""Limits that hold exactly over all workers of one machine, counted in shared memory.

An *account* is the counters of one key or model: what is running, reserved, spent, and three sliding
windows (`windows.py`). Each has a lock of its own, a record lock that the kernel releases with its holder.
A request that has something to return (a place among the running, tokens or money reserved) has a *row* in
its worker's part of a table. When a worker dies the supervisor gives back what its rows hold; `busy` names
the accounts in whose middle the worker died, and those are summed up anew from the rows.

    accounts x (10 counters, 3 windows)
    workers x (busy key, busy model, rows ever used, -, ROWS x row)

Key before model is the order of locks. Rows are written under the lock of the account they name.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from fcntl import LOCK_EX, LOCK_UN, lockf
from typing import NamedTuple

from deepseek_api_compat.config import LimitSettings, ModelSettings
from deepseek_api_compat.errors import ApiError, EngineUnavailable
from deepseek_api_compat.gateway.limits import (
    ACCOUNT,
    COUNTERS,
    DAY,
    MAX_KEYS,
    TOKENS_PER_MINUTE,
    WINDOWS,
    Allowance,
    OverLimit,
    Plan,
    Plans,
    Usage,
    over_budget,
    over_concurrency,
    over_day,
    over_window,
    tightest,
    worst,
)
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.windows import FREED, HEAD, TAIL, TOTAL, Window, Windows
from deepseek_api_compat.security.keys import Principal

# An account's counters. LIFE counts the keys that had this slot: what an earlier one began is not billed
# to the next. SECONDS (float) is how long a request runs, in the mean.
RUNNING, RESERVED, SPENT, TODAY, TODAY_USED, TODAY_RESERVED, LIFE, SECONDS = range(8)
# What all machines know of SPENT and of TODAY_USED; the rest is this one's own, and yet to be told.
HEARD, HEARD_TODAY = range(8, COUNTERS)

# A row: for its key and for its model the account (+ 1, with its life above), whether it is counted as
# running, and the entry (+ 1) in the token window; what is reserved, and of which day.
KEY, MODEL, TOKENS, MONEY, RESERVED_ON = 0, 3, 6, 7, 8
RUNS, ENTRY = 1, 2  # beside KEY and MODEL
ROW = 9
ROWS = 16384  # requests that one worker may have in flight
BUSY, USED = 0, 2
WORKER = 4 + ROWS * ROW

_LIFE = 20  # bits below a life in a row
_ACCOUNT = (1 << _LIFE) - 1
_LOCKS = 1 << 20  # offset of the accounts' locks in the file; slots.py locks its first byte


class Untold(NamedTuple):
    """What was used of an account in its life `life`, on UTC day number `day`, and is counted here."""

    account: int
    life: int
    day: int
    tokens: int
    money: int


class LocalLimiter:
    """Failure policy: memory of one machine can't be away, so nothing fails open. A worker with ROWS
    requests in flight refuses more of those that need a row, with 503.
    """

    away = False

    def __init__(
        self,
        memory: SharedMemory,
        offset: int,
        limits: LimitSettings,
        models: Sequence[ModelSettings],
        *,
        workers: int,
        worker: int = 0,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """The cells start at `offset`. The supervisor has one too, for `load` to `forget_worker` only.

        `clock` must be the same for all processes, as CLOCK_MONOTONIC is; `wall` tells the UTC day.
        """
        self.plans = Plans(limits, models)
        self._ints = memory.ints
        self._floats = memory.floats
        self._fd = memory.fd
        self._windows = Windows(memory)
        self._offset = offset
        self._table = offset + (MAX_KEYS + len(models)) * ACCOUNT
        self._workers = workers
        self._mine = self._table + worker * WORKER
        self._free: list[int] = []
        self._clock = clock
        self._wall = wall

    @staticmethod
    def cells_for(models: int, workers: int) -> int:
        return (MAX_KEYS + models) * ACCOUNT + workers * WORKER

    async def admit_request(self, principal: Principal) -> LocalGrant:
        plan = self.plans.of(principal)
        base = self._offset + plan.account * ACCOUNT
        grant = LocalGrant(self, plan, base, self._ints[base + LIFE], self.today())
        if plan.plain and self._admit_quickly(grant, plan, base):
            return grant
        if plan.requests or plan.concurrency:
            self._admit(grant, plan, base)
        return grant

    def estimate(self, principal: Principal, model: int, prompt: int, max_tokens: int | None) -> int:
        return self.plans.estimate(principal, model, prompt, max_tokens)

    def load(self, slot: int, spent: int, day: int, tokens_today: int) -> None:
        """What the ledger knows of a key: money spent in all, and tokens of the UTC day number `day`."""
        self._load(slot % MAX_KEYS, spent, day, tokens_today)

    def load_model(self, model: int, spent: int, day: int, tokens_today: int) -> None:
        self._load(MAX_KEYS + model, spent, day, tokens_today)

    def charge(self, slot: int | None, model: int | None, tokens: int, money: int) -> None:
        """Count what the ledger found that a request of a dead worker had used.

        None for a key or model that is there no more.
        """
        if slot is not None:
            self.spend(slot % MAX_KEYS, tokens, money)
        if model is not None:
            self.spend(MAX_KEYS + model, tokens, money)

    def reset(self, slot: int) -> None:
        """Forget a deleted key, before its slot goes to another. What it has in flight counts no more."""
        number = slot % MAX_KEYS
        self._lock(number)
        base = self._offset + number * ACCOUNT
        life = self._ints[base + LIFE] + 1
        for cell in range(base, base + COUNTERS):
            self._ints[cell] = 0
        for place in WINDOWS:
            ring = base + place
            for cell in (ring + HEAD, ring + TAIL, ring + TOTAL, ring + FREED):
                self._ints[cell] = 0
        self._ints[base + LIFE] = life
        self._unlock(number)

    def usage(self, slot: int) -> Usage:
        """What is counted of a key now."""
        number = slot % MAX_KEYS
        self._lock(number)
        base = self._roll(number)
        running, reserved, spent, day, used = self._ints[base : base + TODAY_RESERVED]
        self._unlock(number)
        return Usage(running, reserved, spent, day, used)

    def forget_worker(self, worker: int) -> None:
        """Give back all that a dead worker had reserved. Before the next with its number starts."""
        first = self._table + worker * WORKER
        ints = self._ints
        for number in range(ints[first + USED]):
            self._forget_row(first + 4 + number * ROW)
        for busy in (BUSY, BUSY + 1):
            if ints[first + busy]:
                self._repair(ints[first + busy] - 1)
                ints[first + busy] = 0
        ints[first + USED] = 0

    def _admit_quickly(self, grant: LocalGrant, plan: Plan, base: int) -> bool:
        """What `_admit` does, for a key with one limit of requests; False if it is refused."""
        window = plan.requests[0]
        ring = base + window.place
        lockf(self._fd, LOCK_EX, 1, _LOCKS + plan.account)
        self._ints[self._mine] = plan.account + 1
        entry = self._windows.take(ring, window, self._clock())
        left = window.limit - self._ints[ring + TOTAL]
        self._ints[self._mine] = 0
        lockf(self._fd, LOCK_UN, 1, _LOCKS + plan.account)
        if entry < 0:
            return False
        grant.entries = (entry,)
        grant.requests = Allowance(window.limit, left, window.span)
        return True

    def _admit(self, grant: LocalGrant, plan: Plan, base: int) -> None:
        row = self._take_row() if plan.concurrency else -1
        self._enter(plan.account, BUSY)
        try:
            now = self._clock()
            if refusals := self._request_refusals(plan, base, now):
                error = worst(refusals)
                if isinstance(error, OverLimit):
                    error.requests = self._request_allowance(plan, base, now)
                raise error
            grant.entries = self._count_request(plan, base, now)
            grant.requests = self._request_allowance(plan, base, now)
            if row >= 0:
                grant.row, grant.since = row, now
                self._ints[row + TOKENS] = self._ints[row + MONEY] = 0
                self._ints[row + KEY + RUNS] = 1
                self._ints[row + KEY] = plan.account + 1 | grant.life << _LIFE
                self._ints[base + RUNNING] += 1
        finally:
            self._leave(plan.account, BUSY)
            if row >= 0 and grant.row < 0:
                self._free.append(row)

    def reserve(self, grant: LocalGrant, model: Plan | None, tokens: int, money: int) -> None:
        """See Grant. `model`: None if it has no limits."""
        if grant.row < 0:
            grant.row = self._take_row()
        self._enter(grant.plan.account, BUSY)
        try:
            if model is not None:
                self._enter(model.account, BUSY + 1)
            now = self._clock()
            self._roll(grant.plan.account)
            refusals = self._reserve_refusals(grant.plan, grant.base, tokens, money, now)
            if model is not None:
                base = self._roll(model.account)
                refusals += self._request_refusals(model, base, now)
                refusals += self._reserve_refusals(model, base, tokens, money, now)
            if refusals:
                raise self._refused(grant, model, worst(refusals), now)
            self._commit(grant, model, tokens, money, now)
            self._tell_allowances(grant, model, now)
        finally:
            if model is not None:
                self._leave(model.account, BUSY + 1)
            self._leave(grant.plan.account, BUSY)

    def top_up(self, grant: LocalGrant, tokens: int, money: int) -> None:
        """Reserve so much more, whether it fits or not."""
        model, row, ints = grant.model, grant.row, self._ints
        self._enter(grant.plan.account, BUSY)
        try:
            if model is not None:
                self._enter(model.account, BUSY + 1)
            now = self._clock()
            ints[row + TOKENS] += tokens
            ints[row + MONEY] += money
            # What the window holds of it is used up; a dead worker must not give it back.
            ints[row + KEY + ENTRY] = ints[row + MODEL + ENTRY] = 0
            if self._alive(grant):
                self._add(grant.plan, grant.base, grant.day, tokens, money, now)
            if model is not None:
                self._add(model, self._base(model), grant.day, tokens, money, now)
        finally:
            if model is not None:
                self._leave(model.account, BUSY + 1)
            self._leave(grant.plan.account, BUSY)

    def settle(self, grant: LocalGrant, tokens: int, money: int, *, refused: bool = False) -> None:
        """Put what was used in the place of what was reserved, and free the row."""
        row, ints = grant.row, self._ints
        if row < 0 and not refused and grant.plan.tokens is None:
            self._spend(grant, tokens, money)
            return
        self._enter(grant.plan.account, BUSY)
        try:
            if self._alive(grant):
                if refused:
                    self._uncount_request(grant.plan, grant.base, grant.entries)
                self._settle(grant, grant.plan, grant.base, KEY, grant.token_entry, tokens, money)
            if row >= 0:
                ints[row + KEY] = ints[row + KEY + RUNS] = ints[row + KEY + ENTRY] = 0
        finally:
            self._leave(grant.plan.account, BUSY)
        if grant.model is not None:
            self._settle_model(grant, grant.model, tokens, money, refused)
        if row >= 0:
            self._free.append(row)

    def _spend(self, grant: LocalGrant, tokens: int, money: int) -> None:
        """What `settle` does where nothing was reserved."""
        ints, base, account = self._ints, grant.base, grant.plan.account
        day = grant.day
        lockf(self._fd, LOCK_EX, 1, _LOCKS + account)
        if ints[base + LIFE] == grant.life:
            if day > ints[base + TODAY]:
                self._roll(account)
            ints[base + SPENT] += money
            if day == ints[base + TODAY]:
                ints[base + TODAY_USED] += tokens
        lockf(self._fd, LOCK_UN, 1, _LOCKS + account)

    def _settle_model(self, grant: LocalGrant, model: Plan, tokens: int, money: int, refused: bool) -> None:
        ints, side, base = self._ints, grant.row + MODEL, self._base(model)
        self._enter(model.account, BUSY + 1)
        try:
            if refused:
                self._uncount_request(model, base, grant.model_entries)
            self._settle(grant, model, base, MODEL, grant.model_token_entry, tokens, money)
            ints[side] = ints[side + RUNS] = ints[side + ENTRY] = 0
        finally:
            self._leave(model.account, BUSY + 1)

    def today(self) -> int:
        return int(self._wall()) // DAY

    def _request_refusals(self, plan: Plan, base: int, now: float) -> list[ApiError]:
        found: list[ApiError] = []
        for window in plan.requests:
            if wait := self._windows.wait(base + window.place, window, 1, now):
                found.append(over_window(plan, window, 1, wait))
        if plan.concurrency and self._ints[base + RUNNING] >= plan.concurrency:
            found.append(over_concurrency(plan, self._floats[base + SECONDS] / plan.concurrency))
        return found

    def _reserve_refusals(self, plan: Plan, base: int, tokens: int, money: int, now: float) -> list[ApiError]:
        ints = self._ints
        found: list[ApiError] = []
        if (window := plan.tokens) is not None:
            wait = self._windows.wait(base + window.place, window, tokens, now)
            if wait:
                found.append(over_window(plan, window, tokens, wait))
        today = ints[base + TODAY_USED] + ints[base + TODAY_RESERVED] + tokens
        if plan.tokens_per_day and today > plan.tokens_per_day:
            found.append(over_day(plan, tokens, DAY - self._wall() % DAY))
        if plan.budget is not None:
            left = plan.budget - ints[base + SPENT] - ints[base + RESERVED]
            if money > left:
                found.append(over_budget(plan, left))
        return found

    def _refused(self, grant: LocalGrant, model: Plan | None, error: ApiError, now: float) -> ApiError:
        """Undo the admission; both accounts are locked."""
        row = grant.row
        if self._alive(grant):
            self._uncount_request(grant.plan, grant.base, grant.entries)
            self._ints[grant.base + RUNNING] -= self._ints[row + KEY + RUNS]
        self._ints[row + KEY] = self._ints[row + KEY + RUNS] = 0
        self._free.append(row)
        grant.row, grant.open = -1, False
        grant.requests = self._request_allowance(grant.plan, grant.base, now)
        self._tell_allowances(grant, model, now)
        if isinstance(error, OverLimit):
            error.requests, error.tokens = grant.requests, grant.tokens
        return error

    def _commit(self, grant: LocalGrant, model: Plan | None, tokens: int, money: int, now: float) -> None:
        ints, row = self._ints, grant.row
        grant.reserved_tokens, grant.reserved_money, grant.since = tokens, money, now
        ints[row + TOKENS], ints[row + MONEY], ints[row + RESERVED_ON] = tokens, money, grant.day
        if self._alive(grant):
            ints[row + KEY] = grant.plan.account + 1 | grant.life << _LIFE
            grant.token_entry = self._add(grant.plan, grant.base, grant.day, tokens, money, now)
            ints[row + KEY + ENTRY] = grant.token_entry + 1
        if model is not None:
            base = self._base(model)
            grant.model = model
            ints[row + MODEL] = model.account + 1 | ints[base + LIFE] << _LIFE
            grant.model_entries = self._count_request(model, base, now)
            if model.concurrency:
                ints[row + MODEL + RUNS] = 1
                ints[base + RUNNING] += 1
            grant.model_token_entry = self._add(model, base, grant.day, tokens, money, now)
            ints[row + MODEL + ENTRY] = grant.model_token_entry + 1

    def _add(self, plan: Plan, base: int, day: int, tokens: int, money: int, now: float) -> int:
        """Reserve in an account; the entry of the token window, or -1."""
        self._ints[base + RESERVED] += money
        if self._ints[base + TODAY] == day:
            self._ints[base + TODAY_RESERVED] += tokens
        if plan.tokens is None:
            return -1
        return self._windows.add(base + plan.tokens.place, plan.tokens, tokens, now)

    def _settle(
        self, grant: LocalGrant, plan: Plan, base: int, side: int, entry: int, tokens: int, money: int
    ) -> None:
        """One account's part: `side` is KEY or MODEL, `entry` that of the token window, or -1."""
        ints = self._ints
        now = self._clock()
        self._roll(plan.account)
        # A request counts for the day on which it was reserved.
        in_day = ints[base + TODAY] == grant.day
        if grant.row >= 0:
            ints[base + RESERVED] -= grant.reserved_money
            if in_day:
                ints[base + TODAY_RESERVED] -= grant.reserved_tokens
            if ints[grant.row + side + RUNS]:
                self._stopped(base, now - grant.since)
        ints[base + SPENT] += money
        if in_day:
            ints[base + TODAY_USED] += tokens
        if plan.tokens is not None:
            more = tokens - (grant.reserved_tokens if entry >= 0 else 0)
            ring = base + plan.tokens.place
            if more > 0:
                self._windows.add(ring, plan.tokens, more, now)
            elif more < 0:
                self._windows.correct(ring, entry, -more)

    def _stopped(self, base: int, seconds: float) -> None:
        """One less is running, after so long."""
        self._ints[base + RUNNING] -= 1
        mean = self._floats[base + SECONDS]
        self._floats[base + SECONDS] = seconds if mean == 0.0 else mean * 0.8 + seconds * 0.2

    def _count_request(self, plan: Plan, base: int, now: float) -> tuple[int, ...]:
        add = self._windows.add
        return tuple([add(base + window.place, window, 1, now) for window in plan.requests])

    def _uncount_request(self, plan: Plan, base: int, entries: tuple[int, ...]) -> None:
        for window, entry in zip(plan.requests, entries, strict=False):
            self._windows.correct(base + window.place, entry, 1)

    def _request_allowance(self, plan: Plan, base: int, now: float) -> Allowance | None:
        """Of the request limits the tightest."""
        found, least = None, 0
        for window in plan.requests:
            left = window.limit - self._ints[base + window.place + TOTAL]
            if found is None or left < least:
                found, least = window, left
        return None if found is None else self._allowance(found, base, now)

    def _token_allowance(self, plan: Plan, base: int, now: float) -> Allowance | None:
        if not plan.tokens_per_day:
            return None if plan.tokens is None else self._allowance(plan.tokens, base, now)
        left = plan.tokens_per_day - self._ints[base + TODAY_USED] - self._ints[base + TODAY_RESERVED]
        minute = plan.tokens
        if minute is not None and minute.limit - self._ints[base + minute.place + TOTAL] < left:
            return self._allowance(minute, base, now)
        return Allowance(plan.tokens_per_day, max(0, left), DAY - self._wall() % DAY)

    def _tell_allowances(self, grant: LocalGrant, model: Plan | None, now: float) -> None:
        grant.tokens = self._token_allowance(grant.plan, grant.base, now)
        if model is not None:
            base = self._base(model)
            grant.requests = tightest(grant.requests, self._request_allowance(model, base, now))
            grant.tokens = tightest(grant.tokens, self._token_allowance(model, base, now))

    def _allowance(self, window: Window, base: int, now: float) -> Allowance:
        ring = base + window.place
        left = window.limit - self._ints[ring + TOTAL]
        return Allowance(window.limit, left if left > 0 else 0, self._windows.reset(ring, window, now))

    def _base(self, plan: Plan) -> int:
        return self._offset + plan.account * ACCOUNT

    def _alive(self, grant: LocalGrant) -> bool:
        """Whether the grant's key still has its slot."""
        return self._ints[grant.base + LIFE] == grant.life

    def spend(self, number: int, tokens: int, money: int) -> None:
        """Count what was used of an account without a grant of its own."""
        self._lock(number)
        base = self._roll(number)
        self._ints[base + SPENT] += money
        self._ints[base + TODAY_USED] += tokens
        self._unlock(number)

    # Beside the counters of all machines

    def life(self, number: int) -> int:
        """Of an account: which of the keys that had its slot has it now."""
        return self._ints[self._offset + number * ACCOUNT + LIFE]

    def spend_untold(self, number: int, tokens: int, money: int) -> Untold:
        """As `spend`; the others are told of it later, and then it is over to `told`."""
        self.spend(number, tokens, money)
        base = self._offset + number * ACCOUNT
        return Untold(number, self._ints[base + LIFE], self._ints[base + TODAY], tokens, money)

    def heard(self, number: int, life: int) -> tuple[int, int, int] | None:
        """What all know to be spent of an account, and used on which day: day and tokens of it."""
        self._lock(number)
        base = self._roll(number)
        found = self._ints[base + HEARD], self._ints[base + TODAY], self._ints[base + HEARD_TODAY]
        alive = self._ints[base + LIFE] == life
        self._unlock(number)
        return found if alive else None

    def hear(self, number: int, life: int, spent: int, day: int, tokens_today: int) -> None:
        """What all machines have spent of an account by now, and used on that day."""
        self.told(Untold(number, life, 0, 0, 0), (spent, day, tokens_today))

    def told(self, untold: Untold, known: tuple[int, int, int] | None) -> None:
        """All have been told; `known` is as in `hear`, and has it in it."""
        ints = self._ints
        self._lock(untold.account)
        base = self._roll(untold.account)
        if ints[base + LIFE] == untold.life:
            ints[base + SPENT] -= untold.money
            if ints[base + TODAY] == untold.day:
                ints[base + TODAY_USED] -= untold.tokens
            if known is not None:
                self._hear(base, *known)
        self._unlock(untold.account)

    def _hear(self, base: int, spent: int, day: int, tokens_today: int) -> None:
        """The account is locked. What comes late, or from a Redis that has lost its data, changes nothing."""
        ints = self._ints
        if (more := spent - ints[base + HEARD]) > 0:
            ints[base + SPENT] += more
            ints[base + HEARD] = spent
        if ints[base + TODAY] == day and (more := tokens_today - ints[base + HEARD_TODAY]) > 0:
            ints[base + TODAY_USED] += more
            ints[base + HEARD_TODAY] = tokens_today

    def _load(self, number: int, spent: int, day: int, tokens_today: int) -> None:
        """What the ledger knows has in it what was charged before."""
        ints = self._ints
        self._lock(number)
        base = self._roll(number)
        spent -= ints[base + SPENT] - ints[base + HEARD]
        tokens_today -= ints[base + TODAY_USED] - ints[base + HEARD_TODAY]
        self._hear(base, spent, day, tokens_today)
        self._unlock(number)

    def _roll(self, number: int) -> int:
        """Begin a new day if there is one; the account's first cell."""
        base = self._offset + number * ACCOUNT
        today = int(self._wall()) // DAY
        if today > self._ints[base + TODAY]:  # a clock that is set back begins no day
            self._ints[base + TODAY] = today
            self._ints[base + TODAY_USED] = self._ints[base + TODAY_RESERVED] = 0
            self._ints[base + HEARD_TODAY] = 0
        return base

    def _take_row(self) -> int:
        """First cell of a free row of this worker."""
        if self._free:
            return self._free.pop()
        used = self._ints[self._mine + USED]
        if used >= ROWS:
            raise EngineUnavailable(
                f"This gateway process has {ROWS} requests in flight.", code="overloaded", retry_after=1.0
            )
        self._ints[self._mine + USED] = used + 1
        return self._mine + 4 + used * ROW

    def _enter(self, number: int, busy: int) -> None:
        lockf(self._fd, LOCK_EX, 1, _LOCKS + number)
        self._ints[self._mine + busy] = number + 1

    def _leave(self, number: int, busy: int) -> None:
        self._ints[self._mine + busy] = 0
        lockf(self._fd, LOCK_UN, 1, _LOCKS + number)

    def _lock(self, number: int) -> None:
        lockf(self._fd, LOCK_EX, 1, _LOCKS + number)

    def _unlock(self, number: int) -> None:
        lockf(self._fd, LOCK_UN, 1, _LOCKS + number)

    def _forget_row(self, row: int) -> None:
        ints = self._ints
        for side in (row + KEY, row + MODEL):
            named = ints[side]
            if named:
                number = (named & _ACCOUNT) - 1
                self._lock(number)
                base = self._offset + number * ACCOUNT
                if ints[base + LIFE] == named >> _LIFE:
                    self._undo(base, row, side)
                ints[side] = ints[side + RUNS] = ints[side + ENTRY] = 0
                self._unlock(number)
        ints[row + TOKENS] = ints[row + MONEY] = 0

    def _undo(self, base: int, row: int, side: int) -> None:
        ints = self._ints
        ints[base + RUNNING] -= ints[side + RUNS]
        ints[base + RESERVED] -= ints[row + MONEY]
        if ints[base + TODAY] == ints[row + RESERVED_ON]:
            ints[base + TODAY_RESERVED] -= ints[row + TOKENS]
        if ints[side + ENTRY]:
            ring = base + TOKENS_PER_MINUTE
            self._windows.correct(ring, ints[side + ENTRY] - 1, ints[row + TOKENS])

    def _repair(self, number: int) -> None:
        """Sum up an account from all rows."""
        ints = self._ints
        self._lock(number)
        base = self._offset + number * ACCOUNT
        named = number + 1 | ints[base + LIFE] << _LIFE
        sides = [(row, side) for row, side in self._sides() if ints[side] == named]
        ints[base + RUNNING] = sum(ints[side + RUNS] for _, side in sides)
        ints[base + RESERVED] = sum(ints[row + MONEY] for row, _ in sides)
        of_today = [row for row, _ in sides if ints[row + RESERVED_ON] == ints[base + TODAY]]
        ints[base + TODAY_RESERVED] = sum(ints[row + TOKENS] for row in of_today)
        for place in WINDOWS:
            self._windows.repair(base + place)
        self._unlock(number)

    def _sides(self) -> list[tuple[int, int]]:
        """(row, its key's or model's side) of all rows in use."""
        found = []
        for worker in range(self._workers):
            first = self._table + worker * WORKER
            for number in range(self._ints[first + USED]):
                row = first + 4 + number * ROW
                found += [(row, row + side) for side in (KEY, MODEL) if self._ints[row + side]]
        return found


class LocalGrant:
    """See Grant. Everything but the Grant's own methods and allowances is for LocalLimiter."""

    # Of the class, because most requests never change them.
    requests: Allowance | None = None
    tokens: Allowance | None = None
    model: Plan | None = None
    entries: tuple[int, ...] = ()
    model_entries: tuple[int, ...] = ()
    token_entry = -1
    model_token_entry = -1
    reserved_tokens = 0
    reserved_money = 0
    row = -1
    since = 0.0
    open = True

    def __init__(self, limiter: LocalLimiter, plan: Plan, base: int, life: int, day: int) -> None:
        self._limiter = limiter
        self.plan = plan
        self.base = base
        self.life = life
        self.day = day  # of the reservation; until there is one, of the admission

    def reserves(self, model: int) -> bool:
        return self.plan.reserves or self._limiter.plans.models[model].limits or self.row >= 0

    async def reserve(self, model: int, tokens: int, money: int) -> None:
        self.day = self._limiter.today()
        limits = self._limiter.plans.models[model]
        if self.reserves(model):
            try:
                self._limiter.reserve(self, limits if limits.limits else None, tokens, money)
            except EngineUnavailable:
                self.give_back()
                raise

    def use(self, tokens: int, money: int) -> None:
        more_tokens = max(0, tokens - self.reserved_tokens)
        more_money = max(0, money - self.reserved_money)
        if self.open and self.row >= 0 and (more_tokens or more_money):
            self._limiter.top_up(self, more_tokens, more_money)
            self.reserved_tokens += more_tokens
            self.reserved_money += more_money

    def settle(self, tokens: int, money: int) -> None:
        if self.open:
            self.open = False
            if tokens or money or self.row >= 0:
                self._limiter.settle(self, tokens, money)

    def give_back(self) -> None:
        if self.open:
            self.open = False
            if self.entries or self.row >= 0:
                self._limiter.settle(self, 0, 0, refused=True)
