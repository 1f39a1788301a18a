"""Engine slots, leased in order of arrival by all workers of one machine.

A *pool* is the set of replicas behind one model. Each replica has a capacity (its slots, 0 while it is
not ready) and a count of leases per worker. Whoever finds no free slot draws a ticket in the pool's
queue; whoever gives a slot back grants it to the head of the queue and wakes that worker through a
pipe. When a worker dies the supervisor forgets its leases and tickets.

Everything lives in `SharedMemory`, in this layout for each pool (64-bit cells):

    head, tail, waiting, seconds     queue positions; live tickets; mean lease time (float)
    replicas x (capacity, workers x leases)
    QUEUE x ticket                   state | worker << 8 | replica << 16, at position modulo QUEUE
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Sequence
from contextlib import suppress

from deepseek_api_compat.errors import EngineTimeout, RateLimited
from deepseek_api_compat.gateway.shared import SharedMemory

QUEUE = 4096
WAITING, GRANTED, GONE = 1, 2, 3
HEAD, TAIL, LIVE, SECONDS, REPLICAS = range(5)


class SlotTable:
    """The arithmetic on the shared cells. Every method takes the lock itself.

    `acquire`, `release` and the rest return the workers to wake, never wake them: that is `Leases`' part.
    """

    def __init__(self, memory: SharedMemory, offset: int, pools: Sequence[int], workers: int) -> None:
        """`pools[i]` is the number of replicas of pool i; the table starts at cell `offset`."""
        self._memory = memory
        self._cells = memory.ints
        self._floats = memory.floats
        self._workers = workers
        self._replicas = list(pools)
        self._stride = 1 + workers
        self._base: list[int] = []
        for replicas in pools:
            self._base.append(offset)
            offset += self.cells_for([replicas], workers)

    @staticmethod
    def cells_for(pools: Sequence[int], workers: int) -> int:
        return sum(REPLICAS + replicas * (1 + workers) + QUEUE for replicas in pools)

    def acquire(self, pool: int, worker: int, max_queue: int) -> tuple[int, int]:
        """(replica, -1) when a slot was free, else (-1, ticket). Raises RateLimited if the queue is full."""
        with self._memory:
            base = self._base[pool]
            if self._cells[base + LIVE] == 0:
                replica = self._free_replica(pool)
                if replica >= 0:
                    self._cells[self._lease_cell(pool, replica, worker)] += 1
                    return replica, -1
            tail, head = self._cells[base + TAIL], self._cells[base + HEAD]
            if self._cells[base + LIVE] >= max_queue or tail - head >= QUEUE:
                raise RateLimited(
                    "Too many requests are waiting for this model. Please retry later.",
                    code="queue_full",
                    retry_after=self._wait_estimate(pool),
                )
            self._cells[self._ticket_cell(pool, tail)] = WAITING | worker << 8
            self._cells[base + TAIL] = tail + 1
            self._cells[base + LIVE] += 1
            return -1, tail

    def granted(self, pool: int, ticket: int) -> int:
        """The replica that `ticket` was granted, or -1. No lock: the cell is read at once."""
        value = self._cells[self._ticket_cell(pool, ticket)]
        return value >> 16 if value & 0xFF == GRANTED else -1

    def release(self, pool: int, replica: int, worker: int, seconds: float) -> set[int]:
        """Give a slot back after `seconds` of use."""
        with self._memory:
            self._cells[self._lease_cell(pool, replica, worker)] -= 1
            mean = self._base[pool] + SECONDS
            old = self._floats[mean]
            self._floats[mean] = seconds if old == 0.0 else old * 0.8 + seconds * 0.2
            return self._grant(pool)

    def cancel(self, pool: int, ticket: int, worker: int) -> set[int]:
        """Leave the queue; a slot granted in the meantime goes to the next in line."""
        with self._memory:
            cell = self._ticket_cell(pool, ticket)
            value = self._cells[cell]
            self._cells[cell] = GONE
            if value & 0xFF == WAITING:
                self._cells[self._base[pool] + LIVE] -= 1
            elif value & 0xFF == GRANTED:
                self._cells[self._lease_cell(pool, value >> 16, worker)] -= 1
            return self._grant(pool)

    def set_capacity(self, pool: int, replica: int, slots: int) -> set[int]:
        with self._memory:
            self._cells[self._replica_cell(pool, replica)] = slots
            return self._grant(pool)

    def forget_worker(self, worker: int) -> set[int]:
        """Take back all that a dead worker held or waited for."""
        woken: set[int] = set()
        with self._memory:
            for pool, replicas in enumerate(self._replicas):
                base = self._base[pool]
                for replica in range(replicas):
                    self._cells[self._lease_cell(pool, replica, worker)] = 0
                for ticket in range(self._cells[base + HEAD], self._cells[base + TAIL]):
                    cell = self._ticket_cell(pool, ticket)
                    if self._cells[cell] == WAITING | worker << 8:
                        self._cells[cell] = GONE
                        self._cells[base + LIVE] -= 1
                woken |= self._grant(pool)
        return woken

    def usage(self, pool: int) -> tuple[int, int, int]:
        """(slots in use, slots in all, requests waiting)."""
        with self._memory:
            replicas = range(self._replicas[pool])
            used = sum(self._used(pool, replica) for replica in replicas)
            slots = sum(self._cells[self._replica_cell(pool, replica)] for replica in replicas)
            return used, slots, self._cells[self._base[pool] + LIVE]

    def _replica_cell(self, pool: int, replica: int) -> int:
        return self._base[pool] + REPLICAS + replica * self._stride

    def _lease_cell(self, pool: int, replica: int, worker: int) -> int:
        return self._replica_cell(pool, replica) + 1 + worker

    def _ticket_cell(self, pool: int, ticket: int) -> int:
        return self._base[pool] + REPLICAS + self._replicas[pool] * self._stride + ticket % QUEUE

    def _used(self, pool: int, replica: int) -> int:
        first = self._replica_cell(pool, replica) + 1
        return sum(self._cells[first : first + self._workers])

    def _free_replica(self, pool: int) -> int:
        """The replica with the most free slots, or -1."""
        best, most = -1, 0
        for replica in range(self._replicas[pool]):
            free = self._cells[self._replica_cell(pool, replica)] - self._used(pool, replica)
            if free > most:
                best, most = replica, free
        return best

    def _grant(self, pool: int) -> set[int]:
        woken: set[int] = set()
        base = self._base[pool]
        while self._cells[base + HEAD] < self._cells[base + TAIL]:
            cell = self._ticket_cell(pool, self._cells[base + HEAD])
            value = self._cells[cell]
            if value & 0xFF == WAITING:
                replica = self._free_replica(pool)
                if replica < 0:
                    break
                worker = value >> 8 & 0xFF
                self._cells[cell] = GRANTED | worker << 8 | replica << 16
                self._cells[self._lease_cell(pool, replica, worker)] += 1
                self._cells[base + LIVE] -= 1
                woken.add(worker)
            self._cells[base + HEAD] += 1
        return woken

    def _wait_estimate(self, pool: int) -> float:
        """Seconds until a new request would get a slot, at the recent pace."""
        slots = sum(self._cells[self._replica_cell(pool, r)] for r in range(self._replicas[pool]))
        waiting = self._cells[self._base[pool] + LIVE] + 1
        return max(1.0, math.ceil(self._floats[self._base[pool] + SECONDS] * waiting / max(1, slots)))


class Lease:
    """One slot of one replica, to be given back exactly once."""

    __slots__ = ("_leases", "_since", "pool", "replica")

    def __init__(self, leases: Leases, pool: int, replica: int) -> None:
        self._leases: Leases | None = leases
        self._since = time.monotonic()
        self.pool = pool
        self.replica = replica

    def release(self) -> None:
        if self._leases is not None:
            leases, self._leases = self._leases, None
            leases.give_back(self, time.monotonic() - self._since)


class Leases:
    """One worker's side of the slot table: waits without polling, wakes the others."""

    def __init__(
        self,
        table: SlotTable,
        worker: int,
        wake_fds: Sequence[int],
        my_fd: int,
        *,
        max_queue: int,
        timeout: float = 300.0,
    ) -> None:
        """`wake_fds[w]` is the write end of worker w's pipe, `my_fd` the read end of this worker's.

        `max_queue` requests may wait, each at most `timeout` seconds.
        """
        self._table = table
        self._worker = worker
        self._max_queue = max_queue
        self._timeout = timeout
        self._wake_fds = wake_fds
        self._my_fd = my_fd
        self._waiting: dict[tuple[int, int], asyncio.Future[int]] = {}

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_reader(self._my_fd, self._on_wake)

    async def acquire(self, pool: int) -> Lease:
        """Wait for a slot, first come first served.

        Raises RateLimited if the queue is full, EngineTimeout after too long in it.
        """
        replica, ticket = self._table.acquire(pool, self._worker, self._max_queue)
        if ticket >= 0:
            loop = asyncio.get_running_loop()
            waiter: asyncio.Future[int] = loop.create_future()
            self._waiting[pool, ticket] = waiter
            timer = loop.call_later(self._timeout, self._give_up, waiter)
            # A slot may have been granted between drawing the ticket and getting here.
            self._check(pool, ticket, waiter)
            try:
                replica = await waiter
            except BaseException:
                wake(self._wake_fds, self._table.cancel(pool, ticket, self._worker))
                raise
            finally:
                timer.cancel()
                del self._waiting[pool, ticket]
        return Lease(self, pool, replica)

    def give_back(self, lease: Lease, seconds: float) -> None:
        wake(self._wake_fds, self._table.release(lease.pool, lease.replica, self._worker, seconds))

    def usage(self, pool: int) -> tuple[int, int, int]:
        return self._table.usage(pool)

    def _on_wake(self) -> None:
        os.read(self._my_fd, 4096)
        for (pool, ticket), waiter in self._waiting.items():
            self._check(pool, ticket, waiter)

    def _give_up(self, waiter: asyncio.Future[int]) -> None:
        if not waiter.done():
            message = f"No slot became free within {self._timeout:g} seconds."
            waiter.set_exception(EngineTimeout(message, retry_after=self._timeout / 10))

    def _check(self, pool: int, ticket: int, waiter: asyncio.Future[int]) -> None:
        replica = self._table.granted(pool, ticket)
        if replica >= 0 and not waiter.done():
            waiter.set_result(replica)


def wake(fds: Sequence[int], workers: set[int]) -> None:
    """Write a byte to each worker's pipe; a full pipe already holds a wake-up."""
    for worker in workers:
        with suppress(BlockingIOError):
            os.write(fds[worker], b"!")
