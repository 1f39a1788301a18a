"""Limits that hold over several machines: counted in Redis, and by each machine alone while that is away."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import Any, NamedTuple

from deepseek_api_compat.errors import ApiError
from deepseek_api_compat.gateway.limits import (
    MAX_KEYS,
    REQUESTS,
    REQUESTS_PER_MINUTE,
    Allowance,
    Grant,
    OverLimit,
    Plan,
    Usage,
    over_budget,
    over_concurrency,
    over_day,
    over_window,
    worst,
)
from deepseek_api_compat.gateway.local_limits import LocalGrant, LocalLimiter, Untold
from deepseek_api_compat.gateway.windows import Window
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.redis_counters import RedisAway, RedisCounters, Reply

BEAT = 1.0  # seconds, about: how often a worker says that it lives
PATIENCE = 5.0  # seconds of silence after which a worker's reservations are given back
MAX_WAITING = 10_000  # steps that wait for Redis
FLOORS = "key_floor", "model_floor"
_LETTERS = {REQUESTS: "r", REQUESTS_PER_MINUTE: "m"}
logger = logging.getLogger("deepseek_api")


class Step(NamedTuple):
    """What Redis is to be told without anybody waiting for it."""

    operation: str
    key: str
    model: str
    arguments: dict[str, Any]
    of_key: Untold | None = None
    of_model: Untold | None = None


class RedisLimiter:
    """One worker's side.

    Failure policy: when Redis is away each machine enforces the limits alone, in full, by what it knows
    (`away` tells, `on_failure` counts). One task asks whether it is back, about once a second; nobody else
    does. What was used meanwhile is told then, up to MAX_WAITING settlements; more are lost to the shared
    counters, counted by `on_lost`, and still in the ledger. Reservations of a worker that dies are given back
    when its successor starts, or after PATIENCE.
    """

    def __init__(
        self,
        local: LocalLimiter,
        counters: RedisCounters,
        *,
        on_failure: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        """`clock`: unix time for tests; otherwise it is that of the Redis server."""
        self.away = False
        self.local = local
        self._plans = local.plans
        self._counters = counters
        self._on_failure = on_failure
        self._on_lost = on_lost
        self._clock = clock
        self._ids = itertools.count()
        self._numbers = itertools.count()
        self._sending = asyncio.Lock()
        self._waiting: deque[Step] = deque()
        self._something = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._tasks: list[asyncio.Task[None]] = []
        self._closing = False

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._send()), asyncio.create_task(self._beat())]

    async def close(self) -> None:
        """Tell what can be told within a second, and stop."""
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self.settled(), 1.0)
        # The client library waits by asyncio.wait_for, which before Python 3.12 can swallow a cancellation.
        self._closing = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._counters.close()

    async def usage(self, key_id: str) -> Usage:
        """What all machines have counted of a key. Raises RedisAway."""
        arguments = {"now": self._clock()} if self._clock else {}
        reply = await self._counters.step("usage", key_id, "", arguments)
        assert reply.usage is not None
        return Usage(*reply.usage)

    async def forget_key(self, key_id: str) -> None:
        """Of a deleted key nothing needs to be kept. Raises RedisAway."""
        await self._counters.step("reset", key_id, "", {})

    async def settled(self) -> None:
        """Until Redis has been told everything."""
        await self._idle.wait()

    async def admit_request(self, principal: Principal) -> Grant:
        plan = self._plans.of(principal)
        if self.away:
            return await self._alone(principal, plan)
        grant = RedisGrant(self, plan, str(next(self._ids)))
        if not (plan.requests or plan.concurrency):
            return grant
        try:
            reply = await self._ask("admit", grant, {})
        except RedisAway as error:
            self.fell_away(error)
            grant.give_back()  # perhaps it was only the answer that did not come
            return await self._alone(principal, plan)
        grant.stored = True
        grant.take_allowances(reply)
        if reply.refused:
            grant.open = False
            raise refusal(reply, grant, 1, [plan])
        return grant

    def estimate(self, principal: Principal, model: int, prompt: int, max_tokens: int | None) -> int:
        return self._plans.estimate(principal, model, prompt, max_tokens)

    async def reserve(self, grant: RedisGrant, tokens: int, money: int) -> None:
        """See Grant. If Redis goes away in between, the request goes on: it was admitted."""
        plans = [grant.plan] if grant.model is None else [grant.plan, grant.model]
        accounts = [(plan.account, self.local.life(plan.account)) for plan in plans]
        wanted: dict[str, Any] = {"tokens": tokens, "money": money}
        for name, account in zip(FLOORS, accounts, strict=False):
            wanted[name] = self.local.heard(*account)
        try:
            reply = await self._ask("reserve", grant, wanted)
        except RedisAway as error:
            self.fell_away(error)
            return
        for account, known in zip(accounts, (reply.key, reply.model), strict=False):
            if known is not None:
                # For when this machine is alone.
                self.local.hear(*account, *known)
        grant.take_allowances(reply)
        if reply.refused:
            grant.open = False
            raise refusal(reply, grant, tokens, plans)

    def tell(
        self,
        operation: str,
        grant: RedisGrant,
        arguments: dict[str, Any],
        of_key: Untold | None = None,
        of_model: Untold | None = None,
    ) -> None:
        """Tell Redis soon, once, and in order. Until then this machine counts what is untold by itself."""
        key, model = self._names(grant)
        self._queue(Step(operation, key, model, self._arguments(grant, arguments), of_key, of_model))

    def _queue(self, step: Step) -> None:
        if len(self._waiting) >= MAX_WAITING:
            self._on_lost()
            return
        step.arguments["number"] = next(self._numbers)
        self._waiting.append(step)
        self._idle.clear()
        self._something.set()

    def charge(self, key: str, slot: int | None, model: int | None, tokens: int, money: int) -> None:
        """As LocalLimiter.charge; `key` is the key's id."""
        name = "" if model is None else self._plans.models[model].name
        # Of an id that Redis knows no grant of: what was reserved is given back when the worker is forgotten.
        arguments: dict[str, Any] = {"id": f"lost/{next(self._ids)}", "key": {}, "model": {}}
        arguments |= {"tokens": tokens, "money": money, "refused": False}
        if self._clock is not None:
            arguments["now"] = self._clock()
        of_key = None if slot is None else self.local.spend_untold(slot % MAX_KEYS, tokens, money)
        of_model = None if model is None else self.local.spend_untold(MAX_KEYS + model, tokens, money)
        self._queue(Step("settle", "" if slot is None else key, name, arguments, of_key, of_model))

    def settle(self, grant: RedisGrant, tokens: int, money: int, *, refused: bool) -> None:
        of_key = self.local.spend_untold(grant.plan.account, tokens, money)
        model = grant.model
        of_model = None if model is None else self.local.spend_untold(model.account, tokens, money)
        arguments = {"tokens": tokens, "money": money, "refused": refused}
        self.tell("settle", grant, arguments, of_key, of_model)

    def fell_away(self, error: Exception) -> None:
        self._on_failure()
        if not self.away:
            self.away = True
            logger.error("Redis is away (%s): limits are those of this machine alone until it is back", error)

    async def _alone(self, principal: Principal, plan: Plan) -> Grant:
        return LonelyGrant(self, await self.local.admit_request(principal), plan, str(next(self._ids)))

    async def _ask(self, operation: str, grant: RedisGrant, arguments: dict[str, Any]) -> Reply:
        names, arguments = self._names(grant), self._arguments(grant, arguments)
        # Shielded: an answer that nobody waits for must still be undone after it came, not before.
        step = asyncio.ensure_future(self._counters.step(operation, *names, arguments))
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            grant.open = False
            step.add_done_callback(lambda done: self._undo(grant, done))
            raise

    def _undo(self, grant: RedisGrant, step: asyncio.Future[Reply]) -> None:
        if not step.cancelled():
            step.exception()
            self.tell("settle", grant, {"tokens": 0, "money": 0, "refused": True})

    def _names(self, grant: RedisGrant) -> tuple[str, str]:
        return grant.plan.name, grant.model.name if grant.model else ""

    def _arguments(self, grant: RedisGrant, arguments: dict[str, Any]) -> dict[str, Any]:
        arguments = arguments | {"id": grant.id, "key": _limits(grant.plan)}
        if grant.model is not None:
            arguments["model"] = _limits(grant.model)
        if self._clock is not None:
            arguments["now"] = self._clock()
        return arguments

    async def _send(self) -> None:
        """Tell Redis what waits. While it is away `_beat` finds out when it is back, and calls `_flush`."""
        while not self._closing:
            await self._something.wait()
            self._something.clear()
            if not self.away:
                try:
                    await self._flush()
                except RedisAway as error:
                    self.fell_away(error)

    async def _flush(self) -> None:
        async with self._sending:
            while self._waiting:
                await self._tell(self._waiting[0])
                self._waiting.popleft()
            self._idle.set()

    async def _tell(self, step: Step) -> None:
        arguments, untold = step.arguments, (step.of_key, step.of_model)
        for name, one in zip(FLOORS, untold, strict=True):
            if one is not None:
                arguments[name] = self.local.heard(one.account, one.life)
        reply = await self._counters.step(step.operation, step.key, step.model, arguments)
        for one, known in zip(untold, (reply.key, reply.model), strict=True):
            if one is not None:
                self.local.told(one, known)

    async def _beat(self) -> None:
        while not self._closing:
            try:
                await self._counters.beat(PATIENCE, self._clock() if self._clock else None)
                if self.away:
                    await self._flush()  # first what was used meanwhile, then the next request
                    self.away = False
                    logger.warning("Redis is back: limits are those of all machines together again")
            except RedisAway as error:
                self.fell_away(error)
            if not self._closing:
                # Not all workers at the same moment.
                await asyncio.sleep(BEAT * random.uniform(0.8, 1.2))  # noqa: S311


class RedisGrant:
    """See Grant."""

    requests: Allowance | None = None
    tokens: Allowance | None = None
    model: Plan | None = None
    open = True
    stored = False  # Redis knows of it
    told = (0, 0)

    def __init__(self, limiter: RedisLimiter, plan: Plan, id: str) -> None:
        self._limiter = limiter
        self.plan = plan
        self.id = id

    def take_allowances(self, reply: Reply) -> None:
        self.requests = Allowance(*reply.requests) if reply.requests else self.requests
        self.tokens = Allowance(*reply.tokens) if reply.tokens else self.tokens

    def reserves(self, model: int) -> bool:
        return self.plan.reserves or self._limiter.local.plans.models[model].limits or self.stored

    async def reserve(self, model: int, tokens: int, money: int) -> None:
        limits = self._limiter.local.plans.models[model]
        if limits.limits:
            self.model = limits
        if self.reserves(model):
            await self._limiter.reserve(self, tokens, money)
            self.stored = True
            self.told = tokens, money

    def use(self, tokens: int, money: int) -> None:
        if self.open and self.stored and (tokens > self.told[0] or money > self.told[1]):
            self.told = max(tokens, self.told[0]), max(money, self.told[1])
            self._limiter.tell("use", self, {"tokens": tokens, "money": money})

    def settle(self, tokens: int, money: int) -> None:
        self._end(tokens, money, refused=False)

    def give_back(self) -> None:
        self._end(0, 0, refused=True)

    def _end(self, tokens: int, money: int, *, refused: bool) -> None:
        if self.open:
            self.open = False
            if self.stored or tokens or money or refused:
                self._limiter.settle(self, tokens, money, refused=refused)


class LonelyGrant:
    """See Grant: of a request that came while Redis was away, admitted by this machine's own counters."""

    def __init__(self, limiter: RedisLimiter, local: LocalGrant, plan: Plan, id: str) -> None:
        self._limiter = limiter
        self._local = local
        # Under this id Redis knows no grant, so what it used is added to what is spent.
        self._told = RedisGrant(limiter, plan, id)

    @property
    def requests(self) -> Allowance | None:
        return self._local.requests

    @property
    def tokens(self) -> Allowance | None:
        return self._local.tokens

    def reserves(self, model: int) -> bool:
        return self._local.reserves(model)

    async def reserve(self, model: int, tokens: int, money: int) -> None:
        limits = self._limiter.local.plans.models[model]
        if limits.limits:
            self._told.model = limits
        await self._local.reserve(model, tokens, money)

    def use(self, tokens: int, money: int) -> None:
        self._local.use(tokens, money)

    def settle(self, tokens: int, money: int) -> None:
        if self._local.open and (tokens or money):
            day, model = self._local.day, self._told.model
            arguments = {"tokens": tokens, "money": money, "refused": False, "day": day}
            of_key = Untold(self._told.plan.account, self._local.life, day, tokens, money)
            of_model = None if model is None else Untold(model.account, 0, day, tokens, money)
            self._limiter.tell("settle", self._told, arguments, of_key, of_model)
        self._local.settle(tokens, money)

    def give_back(self) -> None:
        self._local.give_back()


def refusal(reply: Reply, grant: RedisGrant, tokens: int, plans: list[Plan]) -> ApiError:
    """The error for what Redis refused, the same as of a machine alone."""
    assert isinstance(reply.refused, list)
    errors = [_error(plans[side - 1], which, value, tokens) for side, which, value in reply.refused]
    error = worst(errors)
    if isinstance(error, OverLimit):
        error.requests, error.tokens = grant.requests, grant.tokens
    return error


def _error(plan: Plan, which: str, value: float, tokens: int) -> ApiError:
    if which == "b":
        return over_budget(plan, int(value))
    if which == "d":
        return over_day(plan, tokens, value)
    if which == "c":
        return over_concurrency(plan, value)
    if which == "t":
        assert plan.tokens is not None
        return over_window(plan, plan.tokens, tokens, inf if value < 0 else value)
    window = next(window for window in plan.requests if _LETTERS[window.place] == which)
    return over_window(plan, window, 1, value)


def _limits(plan: Plan) -> dict[str, Any]:
    """A plan as `limits.lua` takes it."""
    limits: dict[str, Any] = {
        "requests": [_window(window, _LETTERS[window.place]) for window in plan.requests],
        "tokens_per_day": plan.tokens_per_day,
        "concurrency": plan.concurrency,
    }
    if plan.tokens is not None:
        limits["tokens"] = _window(plan.tokens, "t")
    if plan.budget is not None:
        limits["budget"] = plan.budget
    return limits


def _window(window: Window, letter: str) -> list[Any]:
    return [letter, window.limit, window.span, window.shared, window.apart, window.credit]
