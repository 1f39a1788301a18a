"""What keys and models may use: requests, tokens, concurrency and money, reserved before and settled after.

A request's life:

    grant = await limiter.admit_request(principal)        one request, one of those at a time
    await grant.reserve(model, tokens, money)             what it may use of its key and of its model
    grant.use(tokens, money)                              now and then: what it has used so far
    grant.settle(tokens, money)                           exactly once, whatever its end: what it used

A refusal costs nothing of any limit: a failed `reserve` gives back all that `admit_request` took, and
`grant.give_back()` does so for a refusal with another cause (a full queue, no engine ready).

Tokens are those of prompt and answer; money is in micro-units; docs/limits.md is what users are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Protocol

import msgspec

from deepseek_api_compat.config import LimitSettings, ModelSettings
from deepseek_api_compat.errors import ApiError, InsufficientQuota, RateLimited
from deepseek_api_compat.gateway.windows import CELLS, Window, window
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.base import MICRO

MAX_KEYS = 65536
# An account: its counters, then its windows.
COUNTERS = 10
REQUESTS, REQUESTS_PER_MINUTE, TOKENS_PER_MINUTE = WINDOWS = range(COUNTERS, COUNTERS + 3 * CELLS, CELLS)
ACCOUNT = WINDOWS.stop
DAY = 86400  # seconds
MINUTE = 60.0
# A request that needs more than this share of a token limit would keep all others out while it runs.
RESERVABLE_SHARE = 4


class Allowance(msgspec.Struct, frozen=True):
    """What is left of the tightest limit of a kind. `reset`: seconds until all of it is back."""

    limit: int
    remaining: int
    reset: float


class OverLimit(RateLimited):
    """Refused by a limit. The allowances are what headers tell the client; None: there is no such limit."""

    requests: Allowance | None = None
    tokens: Allowance | None = None


class Usage(msgspec.Struct, frozen=True):
    """What is counted of a key. Money in micro-units; `tokens_today` are those of UTC day number `day`."""

    running: int
    reserved: int
    spent: int
    day: int
    tokens_today: int


class Plan(msgspec.Struct, frozen=True):
    """The limits of one key or model, as they are checked. 0 and None: no limit.

    `account` is the number of its counters, `name` a key's id or a model's name, `subject` begins refusals.
    """

    account: int
    name: str
    subject: str
    requests: tuple[Window, ...]
    tokens: Window | None
    tokens_per_day: int
    concurrency: int
    budget: int | None
    token_limit: int  # the smaller of the token limits
    plain: bool  # one limit of requests, and no concurrency
    reserves: bool  # tokens or money must be reserved
    limits: bool  # it limits anything


class Grant(Protocol):
    """One admitted request. Failure policy: only `reserve` raises; the rest is for any `finally`."""

    @property
    def requests(self) -> Allowance | None: ...

    @property
    def tokens(self) -> Allowance | None: ...

    def reserves(self, model: int) -> bool:
        """Whether anything that `reserve` counts is limited; if not, there is no need to call it."""
        ...

    async def reserve(self, model: int, tokens: int, money: int) -> None:
        """Reserve for model number `model`. Once, and before anything is used.

        Raises OverLimit, InsufficientQuota for a budget, or EngineUnavailable if this process has too many
        requests in flight. Then the grant is over and has cost nothing.
        """
        ...

    def use(self, tokens: int, money: int) -> None:
        """What was used so far; what is beyond the reservation counts at once."""
        ...

    def settle(self, tokens: int, money: int) -> None:
        """The end, and what was used in all. A second call, or one after `give_back`, does nothing."""
        ...

    def give_back(self) -> None:
        """The end of a request that was refused after all: as if it had never come."""
        ...


class Limiter(Protocol):
    """The limits of one service, as a worker checks them."""

    @property
    def away(self) -> bool:
        """Whether what several machines share can't be reached, and this one counts alone."""
        ...

    async def admit_request(self, principal: Principal) -> Grant:
        """Raises OverLimit: requests per second or minute, or at the same time."""
        ...

    def estimate(self, principal: Principal, model: int, prompt: int, max_tokens: int | None) -> int:
        """Tokens to reserve for an answer; `max_tokens` None: as many as the model will."""
        ...


class Plans:
    """The limits of each key and model, worked out once for each."""

    def __init__(self, limits: LimitSettings, models: Sequence[ModelSettings]) -> None:
        self._limits = limits
        self._keys: dict[int, tuple[Principal, Plan]] = {}
        self.models = [_model_plan(index, model) for index, model in enumerate(models)]

    def of(self, principal: Principal) -> Plan:
        known = self._keys.get(principal.index)
        if known is not None and (known[0] is principal or _same_limits(known[0], principal)):
            return known[1]
        plan = _key_plan(principal, self._limits)
        self._keys[principal.index] = principal, plan
        return plan

    def estimate(self, principal: Principal, model: int, prompt: int, max_tokens: int | None) -> int:
        """See Limiter. Never so much that a request whose prompt fits could not be admitted at all."""
        tokens = self._limits.reserved_completion_tokens
        if max_tokens is not None:
            tokens = min(tokens, max_tokens)
        for limit in (self.of(principal).token_limit, self.models[model].token_limit):
            if limit:
                tokens = min(tokens, max(1, limit // RESERVABLE_SHARE), max(1, limit - prompt))
        return tokens


def _same_limits(one: Principal, other: Principal) -> bool:
    """Whether these are the same key, perhaps by one of its tokens; limits never change in place."""
    return one.limits is other.limits and one.budget == other.budget and one.id == other.id


def _key_plan(principal: Principal, default: LimitSettings) -> Plan:
    own = principal.limits
    rate = default.requests_per_second if own.rps is None else own.rps
    return _plan(
        account=principal.index % MAX_KEYS,
        name=principal.id,
        subject="This key",
        prefix="",
        rate=rate,
        burst=own.burst or rate * default.burst_seconds,
        per_minute=default.requests_per_minute if own.rpm is None else own.rpm,
        tokens=default.tokens_per_minute if own.tpm is None else own.tpm,
        tokens_per_day=default.tokens_per_day if own.tpd is None else own.tpd,
        concurrency=default.concurrency if own.concurrency is None else own.concurrency,
        budget=principal.budget,
    )


def _model_plan(index: int, model: ModelSettings) -> Plan:
    limits = model.limits
    return _plan(
        account=MAX_KEYS + index,
        name=model.name,
        subject=f"The model {model.name}",
        prefix="model_",
        rate=limits.requests_per_second,
        burst=limits.requests_per_second * limits.burst_seconds,
        per_minute=limits.requests_per_minute,
        tokens=limits.tokens_per_minute,
        tokens_per_day=limits.tokens_per_day,
        concurrency=limits.concurrency,
        budget=None if limits.budget is None else int(limits.budget * MICRO),
    )


def _plan(
    *,
    account: int,
    name: str,
    subject: str,
    prefix: str,
    rate: float,
    burst: float,
    per_minute: int,
    tokens: int,
    tokens_per_day: int,
    concurrency: int,
    budget: int | None,
) -> Plan:
    requests = []
    if rate > 0:
        # Whole requests, at least one; the span makes the rate come out right all the same.
        limit = max(1, int(burst + 1e-9))
        code = prefix + "requests_per_second_exceeded" if prefix else "rate_limit_exceeded"
        requests.append(window(REQUESTS, limit, limit / rate, code, "requests per second", rate))
    if per_minute:
        code = prefix + "requests_per_minute_exceeded"
        requests.append(
            window(REQUESTS_PER_MINUTE, per_minute, MINUTE, code, "requests per minute", per_minute)
        )
    per_minute_tokens = None
    if tokens:
        code = prefix + "tokens_per_minute_exceeded"
        per_minute_tokens = window(TOKENS_PER_MINUTE, tokens, MINUTE, code, "tokens per minute", tokens)
    reserves = bool(tokens or tokens_per_day or budget is not None)
    return Plan(
        account=account,
        name=name,
        subject=subject,
        requests=tuple(requests),
        tokens=per_minute_tokens,
        tokens_per_day=tokens_per_day,
        concurrency=concurrency,
        budget=budget,
        token_limit=min(tokens or tokens_per_day, tokens_per_day or tokens),
        plain=len(requests) == 1 and not concurrency,
        reserves=reserves,
        limits=bool(reserves or requests or concurrency),
    )


def tightest(*allowances: Allowance | None) -> Allowance | None:
    """The one of which least is left."""
    found = [allowance for allowance in allowances if allowance is not None]
    return min(found, key=lambda allowance: allowance.remaining, default=None)


def over_window(plan: Plan, limit: Window, amount: int, wait: float) -> OverLimit:
    """The refusal by a window. `wait`: seconds until this very request fits."""
    if wait == inf:
        return too_large(plan, amount, limit.limit, limit.unit, limit.code)
    message = f"{plan.subject} may use {limit.rate:g} {limit.unit}. Retry in {wait:.2f} s."
    return OverLimit(message, code=limit.code, retry_after=wait)


def over_day(plan: Plan, amount: int, wait: float) -> OverLimit:
    code = _code(plan, "tokens_per_day_exceeded")
    if amount > plan.tokens_per_day:
        return too_large(plan, amount, plan.tokens_per_day, "tokens per day", code)
    message = f"{plan.subject} may use {plan.tokens_per_day} tokens per day; the next begins at 00:00 UTC."
    return OverLimit(message, code=code, retry_after=wait)


def too_large(plan: Plan, amount: int, limit: int, unit: str, code: str) -> OverLimit:
    message = f"{plan.subject} may use {limit} {unit}, and this request alone needs {amount}. Shorten it."
    return OverLimit(message, code=code)


def over_concurrency(plan: Plan, wait: float) -> OverLimit:
    message = f"{plan.subject} may have {plan.concurrency} requests at the same time, and has."
    return OverLimit(message, code=_code(plan, "concurrency_exceeded"), retry_after=max(1.0, wait))


def over_budget(plan: Plan, left: int) -> InsufficientQuota:
    """`left`: micro-units that are neither spent nor reserved."""
    return InsufficientQuota(
        f"{plan.subject} has a budget of which {max(0, left) / MICRO:g} is left, too little for this request."
    )


def worst(refusals: list[ApiError]) -> ApiError:
    """The refusal that holds longest: no retry helps against a budget or a request that is too large."""
    return max(refusals, key=lambda error: inf if error.retry_after is None else error.retry_after)


def _code(plan: Plan, code: str) -> str:
    return code if plan.account < MAX_KEYS else "model_" + code
