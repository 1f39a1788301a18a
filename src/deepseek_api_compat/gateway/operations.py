"""What operators can have done to a running service, by a command or by the admin API: one door for both."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any

import msgspec

from deepseek_api_compat.errors import WrongValue
from deepseek_api_compat.gateway.engine_admin import ENGINE_OPERATIONS, EngineAdmin
from deepseek_api_compat.gateway.ledger import Intake
from deepseek_api_compat.gateway.query import MAX_PAGE
from deepseek_api_compat.security.admin import READ_ONLY, KeyAdmin
from deepseek_api_compat.store.audit import Actor
from deepseek_api_compat.store.ledger import Ledger
from deepseek_api_compat.store.ledger_rows import Filter, Grouping

READERS = 4  # questions that read the ledger at the same time
MAX_GROUPS = 10_000  # of one summary


class SummaryWanted(Filter, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of ledger.summary; () sums up everything."""

    by: tuple[Grouping, ...] = ()


class RowsWanted(Filter, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of ledger.rows. `before`: start (unix milliseconds) and id of the last row seen."""

    limit: Annotated[int, msgspec.Meta(ge=1, le=MAX_PAGE)] = 100
    before: tuple[int, str] | None = None


class PriceWanted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of ledger.price."""

    key_id: str


class Operations:
    """Every operation of a running service. For the supervisor's event loop; the work is done in threads.

    keys.*           see `KeyAdmin`; returns when all workers know of a change
    engines.*        see `EngineAdmin`
    ledger.summary   [{key_id, model, start, requests, tokens, price, outcomes}], see `SummaryWanted`
    ledger.rows      [row], newest first, see `RowsWanted`
    ledger.price     what a key has spent, in micro-units, see `PriceWanted`

    Failure policy: `perform` raises SetupError with a sentence: WrongValue or NoSuchThing for the asker's
    faults, any other where a database fails, or a worker does not confirm a change (which is stored then).
    """

    def __init__(
        self,
        keys: KeyAdmin,
        intake: Intake,
        engines: EngineAdmin,
        publish: Callable[[], Awaitable[None]],
    ) -> None:
        """`publish` gives the keys to all workers."""
        self._keys = keys
        self._intake = intake
        self._engine_admin = engines
        self._publish = publish
        # Of their own, so that nobody's long summaries keep a change of keys waiting.
        self._readers = ThreadPoolExecutor(READERS, "ledger-reader")
        self._queries: dict[str, Callable[[Ledger, dict[str, Any]], Any]] = {
            "ledger.summary": _summary,
            "ledger.rows": _rows,
            "ledger.price": _price,
        }

    async def perform(self, op: str, params: dict[str, Any], actor: Actor) -> Any:
        """The result, plain data for JSON."""
        if op in ENGINE_OPERATIONS:
            return await self._engine_admin.perform(op, params, actor)
        if query := self._queries.get(op):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._readers, lambda: query(self._intake.ledger(), params))
        result = await asyncio.to_thread(self._keys.handle, op, params, actor)
        if op not in READ_ONLY:
            await self._publish()
        return result

    def close(self) -> None:
        """Start no more queries of the ledger."""
        self._readers.shutdown(wait=False, cancel_futures=True)


def _summary(ledger: Ledger, params: dict[str, Any]) -> Any:
    wanted = _converted("ledger.summary", params, SummaryWanted)
    found = ledger.summary(wanted, wanted.by, MAX_GROUPS)
    if len(found) > MAX_GROUPS:
        problem = f"That is over {MAX_GROUPS} groups: ask for less time, or for one key or model."
        raise WrongValue(problem, "group_by")
    return msgspec.to_builtins(found)


def _rows(ledger: Ledger, params: dict[str, Any]) -> Any:
    wanted = _converted("ledger.rows", params, RowsWanted)
    return [msgspec.structs.asdict(row) for row in ledger.newest(wanted, wanted.limit, wanted.before)]


def _price(ledger: Ledger, params: dict[str, Any]) -> Any:
    return ledger.price(_converted("ledger.price", params, PriceWanted).key_id)


def _converted(op: str, params: dict[str, Any], type: type[Any]) -> Any:
    try:
        return msgspec.convert(params, type)
    except msgspec.ValidationError as error:
        raise WrongValue(f"Wrong parameters for {op}: {error}.") from None
