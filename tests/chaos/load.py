"""Clients that ask without end, and what became of each request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from random import Random

from chaos.asks import Asker
from chaos.exchange import PATIENCE, Connection, Exchange
from chaos.fates import Fate, judge

KILL_WINDOW = 3.0  # seconds after a worker's death in which connections of its clients may break


class Load:
    """worker_deaths: time.monotonic() of each, as they come. `fates` are those of all requests so far."""

    def __init__(self, port: int, keys: dict[str, str], seed: int, worker_deaths: Sequence[float]) -> None:
        self.fates: list[tuple[Exchange, Fate]] = []
        self._port = port
        self._keys = keys
        self._seed = seed
        self._deaths = worker_deaths

    async def run(self, clients: int, until: float, pause: float = 1.0) -> None:
        """So many clients ask until that time.monotonic(); returns when all have their answers."""
        await asyncio.gather(
            *(self._client(Random(f"{self._seed} {n}"), until, pause) for n in range(clients))
        )

    async def _client(self, dice: Random, until: float, pause: float) -> None:
        asker = Asker(dice)
        connection: Connection | None = None
        while time.monotonic() < until:
            ask = asker.next()
            if connection is not None and (not ask.reuse or ask.slow or not connection.usable):
                connection.close()
                connection = None
            if connection is None:
                connection = await Connection.open(self._port, slow=ask.slow)
            found = await connection.exchange(ask, self._keys[ask.key])
            self._note(found)
            await asyncio.sleep(dice.uniform(0, pause))
        if connection is not None:
            connection.close()

    def _note(self, found: Exchange) -> None:
        fate = judge(found)
        if fate.kind == "broken" and not self._excused(found):
            fate = Fate("wrong", f"the connection broke, and no worker was killed: {fate.why}")
        if fate.kind == "answered":
            found.body = b""  # of those nothing more is to be told
        self.fates.append((found, fate))

    def _excused(self, found: Exchange) -> bool:
        # One who reads slowly comes to the end of what was sent before the death when he does.
        window = PATIENCE if found.ask.slow else KILL_WINDOW
        deaths = [death for death in self._deaths if found.began <= death + 0.5]
        return any(death - 0.5 <= found.ended <= death + window for death in deaths)
