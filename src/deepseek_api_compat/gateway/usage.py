"""What keys have used: `GET /usage` and DeepSeek's `GET /user/balance` for a key's own, in JSON and CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, get_args

from deepseek_api_compat.errors import InvalidRequest, LedgerUnavailable, OperationFailed
from deepseek_api_compat.gateway.gate import Call, Route
from deepseek_api_compat.gateway.query import Query, moment, text
from deepseek_api_compat.gateway.response import send_json
from deepseek_api_compat.security.key_fields import money
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.audit import Actor
from deepseek_api_compat.store.base import MICRO
from deepseek_api_compat.store.ledger_rows import DAY, HOUR, Outcome

# An operation by the supervisor: its name, parameters, and who wants it. Raises ApiError.
AskFor = Callable[[str, dict[str, Any], Actor], Awaitable[Any]]

USERS = frozenset({"user", "admin"})
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens")
GROUPS = {"key": "key_id", "model": "model", "hour": "start", "day": "start"}  # and the field that tells it
LONGEST = {"hour": 92 * DAY, "day": 1098 * DAY}  # seconds that one question may be about
USUAL = {"hour": DAY, "day": 30 * DAY}  # seconds before `to`, unless `from` is given
NO_STORE = b"cache-control: no-store\r\n"


class UsageApi:
    """A key's own usage and balance. They are as new as the ledger: about a second behind.

    Failure policy: when the ledger can't be read the answer is a 503 without the supervisor's words, which
    are for operators.
    """

    def __init__(self, ask: AskFor, currency: str) -> None:
        self._ask = ask
        self._currency = currency

    def routes(self) -> list[Route]:
        return [
            Route("/usage", {"GET": self.usage}, USERS),
            Route("/user/balance", {"GET": self.balance}, USERS),
        ]

    async def usage(self, call: Call) -> None:
        principal = caller(call)
        query = Query(call.scope["query_string"], {"from", "to", "group_by", "model"})
        wanted = {**period(query, {"model", "hour", "day"}), "key_id": principal.id}
        answer = usage_object(wanted, await self._of_ledger(call, "ledger.summary", wanted), self._currency)
        await send(call, answer)

    async def balance(self, call: Call) -> None:
        principal = caller(call)
        left: int | None = None
        if principal.budget is not None:
            spent = await self._of_ledger(call, "ledger.price", {"key_id": principal.id})
            left = max(0, principal.budget - spent)
        await send(call, balance_object(left, self._currency))

    async def _of_ledger(self, call: Call, op: str, params: dict[str, Any]) -> Any:
        try:
            return await self._ask(op, params, actor_of(call))
        except OperationFailed as error:
            problem = "Usage can't be read now."
            raise LedgerUnavailable(problem, retry_after=error.retry_after) from None


def caller(call: Call) -> Principal:
    assert call.principal is not None, "the gate lets nobody else pass"
    return call.principal


def actor_of(call: Call) -> Actor:
    return Actor("key", caller(call).id, call.id)


async def send(call: Call, value: object) -> None:
    call.tally.status = 200
    await send_json(call.out, 200, value, [*call.headers, NO_STORE])


def period(query: Query, groups: set[str]) -> dict[str, Any]:
    """`from`, `to`, `group_by` and `model` of a query, as parameters of ledger.summary."""
    by = query.get("group_by", lambda given: _groups(given, groups)) or []
    step = "hour" if "hour" in by else "day"
    until = query.get("to", moment)
    until = time.time() if until is None else until
    since = query.get("from", moment)
    since = max(0.0, until - USUAL[step]) if since is None else since
    if since >= until:
        raise InvalidRequest("`from` must be before `to`.", param="from")
    if until - since > LONGEST[step]:
        problem = f"`from` and `to` must be at most {LONGEST[step] // DAY} days apart, grouped like this."
        raise InvalidRequest(problem, param="from")
    return {"since": since, "until": until, "by": by, "model": query.get("model", text)}


def _groups(given: str, allowed: set[str]) -> list[str]:
    """Names between commas, in the order in which answers have them."""
    named = given.split(",")
    if not set(named) <= allowed or len(set(named)) < len(named) or {"hour", "day"} <= set(named):
        words = ", ".join(group for group in GROUPS if group in allowed)
        raise ValueError(f"one or several of {words}, with commas between them, and not both hour and day")
    return [group for group in GROUPS if group in named]


def usage_object(wanted: dict[str, Any], found: Iterable[dict[str, Any]], currency: str) -> dict[str, Any]:
    """The answer to a question about usage: sums over whole UTC hours, money as decimal strings."""
    return {
        "object": "list",
        "from": int(wanted["since"] // HOUR * HOUR),
        "to": int(-(-wanted["until"] // HOUR) * HOUR),
        "group_by": wanted["by"],
        "currency": currency,
        "data": [_sums(one, wanted["by"]) for one in found],
    }


def _sums(one: dict[str, Any], by: list[str]) -> dict[str, Any]:
    groups = {GROUPS[group]: one[GROUPS[group]] for group in by}
    counts = {name: one[name] for name in COUNTS}
    return {**groups, **counts, "price": money(one["price"]), "outcomes": one["outcomes"]}


def usage_csv(answer: dict[str, Any]) -> bytes:
    """The same as comma-separated values, with a column for each outcome."""
    outcomes = get_args(Outcome)
    groups = [GROUPS[group] for group in answer["group_by"]]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow([*groups, *COUNTS, "price", "currency", *outcomes])
    for one in answer["data"]:
        cells = [one[name] for name in (*groups, *COUNTS, "price")]
        writer.writerow([*cells, answer["currency"], *(one["outcomes"].get(name, 0) for name in outcomes)])
    return file.getvalue().encode()


def balance_object(left: int | None, currency: str) -> dict[str, Any]:
    """DeepSeek's object for what is left of a budget (micro-units). Without a budget there is no balance."""
    if left is None:
        return {"is_available": True, "balance_infos": []}
    cents, rest = divmod(left % MICRO, 10_000)
    total = f"{left // MICRO}.{cents:02}" + f"{rest:04}".rstrip("0")
    info = {
        "currency": currency,
        "total_balance": total,
        "granted_balance": total,
        "topped_up_balance": "0.00",
    }
    return {"is_available": left > 0, "balance_infos": [info]}
