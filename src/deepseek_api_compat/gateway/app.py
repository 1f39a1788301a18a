"""Composition root of a worker: builds every part once and connects them."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import Coroutine, Sequence
from typing import Any

from deepseek_api_compat.config import Settings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.gateway import metrics
from deepseek_api_compat.gateway.account import Books
from deepseek_api_compat.gateway.admin import AdminApi
from deepseek_api_compat.gateway.chat import ChatService
from deepseek_api_compat.gateway.gate import Gate
from deepseek_api_compat.gateway.idempotency import Repeats
from deepseek_api_compat.gateway.journal import Journal
from deepseek_api_compat.gateway.journal_files import JOURNALS
from deepseek_api_compat.gateway.local_limits import LocalLimiter
from deepseek_api_compat.gateway.plugins import Plugins
from deepseek_api_compat.gateway.pool import Doubt, ModelPool
from deepseek_api_compat.gateway.prices import Prices
from deepseek_api_compat.gateway.redis_limits import RedisLimiter
from deepseek_api_compat.gateway.response import Pulse
from deepseek_api_compat.gateway.routes import Api, ModelDirectory, decode_limits
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.sight import Sight
from deepseek_api_compat.gateway.slots import Leases, SlotTable
from deepseek_api_compat.gateway.templates import Templates
from deepseek_api_compat.gateway.usage import AskFor, UsageApi
from deepseek_api_compat.security.keys import KeyTable
from deepseek_api_compat.store.redis_counters import RedisCounters


def replica_counts(settings: Settings) -> list[int]:
    """Replicas behind each model, in the order of the settings."""
    return [sum(engine.replicas for engine in model.engines) for model in settings.models]


def shared_cells(settings: Settings) -> int:
    """Cells of shared memory that a service with these settings needs."""
    workers = settings.server.workers
    return SlotTable.cells_for(replica_counts(settings), workers) + LocalLimiter.cells_for(
        len(settings.models), workers
    )


def slot_table(settings: Settings, memory: SharedMemory) -> SlotTable:
    return SlotTable(memory, 0, replica_counts(settings), settings.server.workers)


def local_limiter(settings: Settings, memory: SharedMemory, worker: int = 0) -> LocalLimiter:
    """The limits of worker number `worker`; for the supervisor of any."""
    workers = settings.server.workers
    offset = SlotTable.cells_for(replica_counts(settings), workers)
    return LocalLimiter(memory, offset, settings.limits, settings.models, workers=workers, worker=worker)


def shared_limiter(
    settings: Settings, local: LocalLimiter, worker: int | None = None
) -> LocalLimiter | RedisLimiter:
    """`local`, or where a Redis is configured that of all machines. Raises ConfigError for a wrong URL.

    `worker`: the number of the process; None: it is the supervisor.
    """
    if settings.limits.redis_url is None:
        return local
    # Two services of one machine have data directories of their own.
    directory = hashlib.sha256(bytes(settings.data_dir)).hexdigest()[:8]
    place = f"{socket.gethostname()}/{directory}:{'supervisor' if worker is None else worker}"
    return RedisLimiter(
        local,
        RedisCounters(settings.limits.redis_url, place, os.urandom(6).hex()),
        on_failure=metrics.REDIS_FAILURES.inc,
        on_lost=metrics.SETTLEMENTS_LOST.inc,
    )


class Application:
    """One worker's gateway. `gate` is the ASGI application; the rest is how the supervisor reaches it."""

    def __init__(
        self,
        settings: Settings,
        keys: KeyTable,
        memory: SharedMemory,
        *,
        worker: int,
        wake_fds: Sequence[int],
        my_fd: int,
        created: int,
        ask: AskFor,
        repeats: Repeats,
        on_doubt: Doubt,
    ) -> None:
        """`ask`: an operation by the supervisor, who is told of doubtful replicas by `on_doubt`."""
        limits = settings.limits
        self._leases = Leases(
            slot_table(settings, memory),
            worker,
            wake_fds,
            my_fd,
            max_queue=limits.max_queue,
            timeout=limits.queue_timeout,
        )
        self._pools = [
            ModelPool(index, model, self._leases, on_doubt=on_doubt)
            for index, model in enumerate(settings.models)
        ]
        self.limiter = shared_limiter(settings, local_limiter(settings, memory, worker), worker)
        self.pulse = Pulse(settings.server.first_event_timeout, settings.server.keep_alive_interval)
        directory = ModelDirectory(self._pools, created)
        self._templates = Templates()
        chat = ChatService(self._templates, max_choices=limits.max_n)
        currency = settings.ledger.currency
        usage, admin = UsageApi(ask, currency), AdminApi(ask, currency)
        self.journal = Journal(settings.data_dir / JOURNALS, worker, settings.ledger)
        self.books = Books(self.limiter, self.journal, Prices(settings.prices))
        self._plugins = Plugins(settings.plugins, settings.data_dir, decode_limits(settings))
        self._sight = Sight(settings)
        api = Api(
            directory,
            chat,
            self.books,
            usage,
            admin,
            repeats,
            self.pulse,
            self._plugins,
            self._sight,
            settings,
        )
        self.gate = Gate(api.routes(), keys, self.limiter, self.journal, settings)
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        self._leases.start(asyncio.get_running_loop())
        if isinstance(self.limiter, RedisLimiter):
            self.limiter.start()
        if any(pool.kind == "token" for pool in self._pools):
            self._beside(self._templates.warm())

    async def close(self) -> None:
        """End what was started besides; no request is served any more."""
        await self._plugins.close()
        await self._sight.close()
        await self._templates.close()
        for pool in self._pools:
            await pool.close()
        if isinstance(self.limiter, RedisLimiter):
            await self.limiter.close()
        self.journal.close()

    def use_keys(self, keys: KeyTable) -> None:
        self.gate.keys = keys

    def use_engines(self, states: list[EngineState]) -> None:
        for pool in self._pools:
            for client in pool.update([state for state in states if state.model == pool.name]):
                self._beside(client.close())

    def _beside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
