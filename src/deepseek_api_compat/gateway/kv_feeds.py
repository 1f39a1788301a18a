"""Who listens to what a model's engines tell of their KV caches, from when to when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

import msgspec

from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.engines.kv_events import KVSource
from deepseek_api_compat.gateway.balance import Balance

# One in doubt, or out of service, goes on computing.
ALIVE = frozenset({"ready", "doubtful", "drained"})


class _Feed(msgspec.Struct, frozen=True):
    """The life of one engine, and who listens to it."""

    pid: int | None
    source: KVSource
    task: asyncio.Task[None]


class Feeds:
    """One model's: a task for each engine that tells, for as long as that lives. A dead one holds nothing."""

    def __init__(self, balance: Balance) -> None:
        self._balance = balance
        self._feeds: dict[int, _Feed] = {}
        self._ending: set[asyncio.Task[None]] = set()

    def update(self, states: Sequence[EngineState]) -> None:
        """The supervisor's view, after the balance has taken it over."""
        for state in states:
            feed = self._feeds.get(state.replica)
            source = state.kv if state.state in ALIVE else None
            if feed is not None and (feed.pid, feed.source) != (state.pid, source):
                self._end(self._feeds.pop(state.replica))
                self._balance.begin(state.replica)
                feed = None
            if feed is None and source is not None:
                task = asyncio.ensure_future(self._listen(state.replica, source))
                self._feeds[state.replica] = _Feed(state.pid, source, task)

    async def close(self) -> None:
        for feed in self._feeds.values():
            self._end(feed)
        self._feeds.clear()
        await asyncio.gather(*self._ending, return_exceptions=True)

    def _end(self, feed: _Feed) -> None:
        feed.task.cancel()
        self._ending.add(feed.task)
        feed.task.add_done_callback(self._ending.discard)

    async def _listen(self, replica: int, source: KVSource) -> None:
        from deepseek_api_compat.engines.kv_reader import KVReader  # of an extra

        balance = self._balance
        await KVReader(source, partial(balance.tell, replica), partial(balance.begin, replica)).run()
