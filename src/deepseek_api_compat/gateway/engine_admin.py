"""What operators do to running engines: look at them, take them out of service, start them anew."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deepseek_api_compat.errors import NoSuchThing, SetupError, WrongValue
from deepseek_api_compat.gateway.replicas import Replica
from deepseek_api_compat.store.audit import Actor

ENGINE_OPERATIONS = frozenset({"engines.list", "engines.drain", "engines.restart"})
SHOWN = ("model", "replica", "kind", "state", "pid", "detail", "argv", "memory", "started")
MOVING_TIME = 10.0  # seconds in which answers should have left a drained replica for another one
POLL = 0.05
logger = logging.getLogger("deepseek_api")


class _Which(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Parameters of engines.drain; `replica` None: all of the model."""

    model: str
    replica: int | None = None


class _Restart(_Which, frozen=True, kw_only=True):
    """Parameters of engines.restart. `wait`: answer when it is done, and say if it fails."""

    path: str | None = None
    wait: bool = True


class EngineAdmin:
    """The `engines.*` operations, for the supervisor's event loop.

    engines.list                                  [{model, replica, kind, state, pid, detail}]
    engines.drain {model, replica}                the same, of those that were drained
    engines.restart {model, replica, path, wait}  the same, of those that were started anew

    A drained replica gets no new work, and the answers that it is making go on at the other replicas of its
    model; if none of them is ready, they run to their end. A restart takes one replica after the other:
    drained, moved, stopped, started, ready. Where there is no other, answers wait for its return. With `path`
    it comes back with another model of the same tokens.

    Failure policy: SetupError says what is wrong; a restart ends with the first replica that does not come
    back.
    """

    def __init__(self, replicas: Callable[[], Sequence[Replica]], leases: Callable[[Replica], int]) -> None:
        """`leases`: how many answers a replica is making."""
        self._replicas = replicas
        self._leases = leases
        self._restarts: dict[str, asyncio.Task[None]] = {}  # by model

    async def perform(self, op: str, params: dict[str, Any], actor: Actor) -> list[dict[str, Any]]:
        if op == "engines.list":
            return [_shown(replica) for replica in self._replicas()]
        wanted = _converted(op, params, _Which if op == "engines.drain" else _Restart)
        found = self._find(wanted)
        logger.info("%s %s by %s %s", op, params, actor.kind, actor.id)
        if isinstance(wanted, _Restart):
            await self._restart(found, wanted)
        else:
            for replica in found:
                replica.drain()
        return [_shown(replica) for replica in found]

    async def close(self) -> None:
        """Give up the restarts under way: the service stops."""
        for task in self._restarts.values():
            task.cancel()
        await asyncio.gather(*self._restarts.values(), return_exceptions=True)

    async def _restart(self, replicas: Sequence[Replica], wanted: _Restart) -> None:
        running = self._restarts.get(wanted.model)
        if running is not None and not running.done():
            raise SetupError(f"The engines of {wanted.model} are being restarted already.")
        path = None if wanted.path is None else Path(wanted.path)
        if path is not None and not path.is_absolute():
            raise WrongValue("The path must be absolute.", "path")
        task = self._restarts[wanted.model] = asyncio.create_task(self._roll(replicas, path))
        task.add_done_callback(_log_failure)
        if wanted.wait:
            # Shielded: it goes on when the one who asked gives up waiting.
            await asyncio.shield(task)

    async def _roll(self, replicas: Sequence[Replica], path: Path | None) -> None:
        if path is not None:
            for replica in replicas:
                await replica.check(path)
        for replica in replicas:
            others = [r for r in self._replicas() if r.pool == replica.pool and r is not replica]
            if any(other.state == "ready" for other in others):
                replica.drain()
                await self._until_moved(replica)
            await replica.restart(path)

    async def _until_moved(self, replica: Replica) -> None:
        for _ in range(round(MOVING_TIME / POLL)):
            if not self._leases(replica):
                return
            await asyncio.sleep(POLL)

    def _find(self, wanted: _Which) -> list[Replica]:
        found = [
            replica
            for replica in self._replicas()
            if replica.model == wanted.model and wanted.replica in (None, replica.number)
        ]
        if not found:
            which = f" {wanted.replica}" if wanted.replica is not None else ""
            raise NoSuchThing(f"There is no replica{which} of a model {wanted.model}.")
        return found


def _shown(replica: Replica) -> dict[str, Any]:
    state = replica.describe()
    return {field: getattr(state, field) for field in SHOWN}


def _converted(op: str, params: dict[str, Any], type: type[_Which]) -> _Which:
    try:
        return msgspec.convert(params, type)
    except msgspec.ValidationError as error:
        raise WrongValue(f"Wrong parameters for {op}: {error}.") from None


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("engines.restart: %s", error)
