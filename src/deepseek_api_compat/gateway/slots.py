"""Engine slots, leased by all workers of one machine, in fair shares to all keys.

A *pool* is the set of replicas behind one model. Each replica has a capacity (its slots, 0 while it is
not ready) and a count of leases per worker. Whoever finds no free slot draws a ticket in the pool's
queue; whoever gives a slot back grants it and wakes that worker through a pipe. It goes to the waiting key
with the fewest leases, over all workers (max-min fairness); among equals to the key that got one the longest
ago, and within a key in order of arrival. When a worker dies the supervisor forgets its leases and tickets.

Everything lives in `SharedMemory`, in this layout (64-bit cells): five cells that tell what a worker was
doing if it dies while it grants a slot to another, so that the next who comes finishes it; then each pool's

    head, tail, waiting, seconds     queue positions; live tickets; mean lease time (float)
    turn                             leases ever granted
    replicas x (capacity, generation, workers x leases)
    workers x KEYS x leases          the same leases by key
    KEYS x turn                      when a key got its last one
    QUEUE x ticket                   state | worker << 8 | key << 16 | replica << 32, at position modulo
                                     QUEUE; while it waits, urgent << 32 | (home + 1) << 40 for the replica

A ticket may have a *home*: the replica that holds its prompt's beginning. A slot there goes to it before it
goes to others whose key has as much, unless somebody has waited for very long. A queue that is blind to
prefixes would scatter all conversations as soon as all slots are taken.

An answer that has begun and lost its engine draws an *urgent* ticket (bit 32 while it waits): it is served
before all others, it is never refused and never gives way. A replica that a worker finds dead gets no more
leases at once (`suspend`): its capacity becomes 0, unless the supervisor has set it anew since that worker
got its lease, which the replica's generation tells.
"""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple

from deepseek_api_compat.errors import EngineTimeout, RateLimited
from deepseek_api_compat.gateway.shared import SharedMemory

QUEUE = 8192  # at least twice as many as may wait
PASSED_OVER = QUEUE // 2  # later tickets that may be served before one: then it is served next
KEYS = 4096  # two keys whose numbers differ by a multiple of this count as one
WAITING, GRANTED, GONE, DISPLACED = 1, 2, 3, 4
URGENT = 1 << 32
HOME = 40  # bits
# So many later tickets may have been drawn since the oldest one that waits, for homes to count.
HOMES_COUNT = 256
HEAD, TAIL, LIVE, SECONDS, TURN, REPLICAS = range(6)
# A grant under way: ticket + 1, its pool and replica, and what both counts of leases are to become.
GRANTING, POOL, REPLICA, LEASES, KEY_LEASES, FIRST_POOL = range(6)


class Place(NamedTuple):
    """A slot of `replica` (then `ticket` is -1), or a `ticket` in the queue (then `replica` is -1).

    `woken`: the worker whose ticket had to give way, to be woken.
    """

    replica: int
    ticket: int
    woken: frozenset[int] = frozenset()


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
        self._stride = 2 + workers
        self._first = offset
        self._base: list[int] = []
        offset += FIRST_POOL
        for replicas in pools:
            self._base.append(offset)
            offset += self._cells_of(replicas, workers)
        self._no_leases = memoryview(bytes(KEYS * 8)).cast("q")

    @classmethod
    def cells_for(cls, pools: Sequence[int], workers: int) -> int:
        return FIRST_POOL + sum(cls._cells_of(replicas, workers) for replicas in pools)

    @staticmethod
    def _cells_of(replicas: int, workers: int) -> int:
        return REPLICAS + replicas * (2 + workers) + (workers + 1) * KEYS + QUEUE

    def __enter__(self) -> None:
        self._memory.__enter__()
        if self._cells[self._first]:
            self._finish_grant()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._memory.__exit__(kind, error, trace)

    def acquire(
        self,
        pool: int,
        worker: int,
        max_queue: int,
        key: int = 0,
        *,
        urgent: bool = False,
        order: Sequence[int] = (),
        home: int = -1,
    ) -> Place:
        """A slot if one is free, else a place in the queue. Raises RateLimited if the queue is full.

        A full queue makes room for a key that holds less than another, at the cost of its newest ticket; an
        urgent one gets in all the same. `order`: the replicas to take a free slot of, the best first; without
        it, and if none of them has one, that with the most free slots. `home`: the replica worth waiting for.
        """
        key %= KEYS
        with self:
            base = self._base[pool]
            if self._cells[base + LIVE] == 0:
                replica = self._free_replica(pool, order)
                if replica >= 0:
                    self._lease(pool, replica, worker, key, 1)
                    self._take_turn(pool, key)
                    return Place(replica, -1)
            woken: frozenset[int] = frozenset()
            tail = self._cells[base + TAIL]
            if tail - self._cells[base + HEAD] >= QUEUE:
                raise self._full(pool)
            if self._cells[base + LIVE] >= max_queue and not urgent:
                woken = self._displace(pool, key)
            self._cells[self._ticket_cell(pool, tail)] = (
                WAITING | worker << 8 | key << 16 | (URGENT if urgent else 0) | home + 1 << HOME
            )
            self._cells[base + TAIL] = tail + 1
            self._cells[base + LIVE] += 1
            return Place(-1, tail, woken)

    def granted(self, pool: int, ticket: int) -> int:
        """The replica that `ticket` was granted, or -1. No lock: the cell is read at once."""
        value = self._cells[self._ticket_cell(pool, ticket)]
        return value >> 32 if value & 0xFF == GRANTED else -1

    def displaced(self, pool: int, ticket: int) -> bool:
        """Whether `ticket` had to give way. No lock, as above."""
        return self._cells[self._ticket_cell(pool, ticket)] & 0xFF == DISPLACED

    def full(self, pool: int) -> RateLimited:
        """The refusal of one whose ticket had to give way."""
        with self:
            return self._full(pool)

    def release(self, pool: int, replica: int, worker: int, seconds: float, key: int = 0) -> set[int]:
        """Give a slot back after `seconds` of use."""
        with self:
            self._lease(pool, replica, worker, key % KEYS, -1)
            mean = self._base[pool] + SECONDS
            old = self._floats[mean]
            self._floats[mean] = seconds if old == 0.0 else old * 0.8 + seconds * 0.2
            return self._grant(pool)

    def cancel(self, pool: int, ticket: int, worker: int) -> set[int]:
        """Leave the queue; a slot granted in the meantime goes to the next in line."""
        with self:
            cell = self._ticket_cell(pool, ticket)
            value = self._cells[cell]
            self._cells[cell] = GONE
            if value & 0xFF == WAITING:
                self._cells[self._base[pool] + LIVE] -= 1
            elif value & 0xFF == GRANTED:
                self._lease(pool, value >> 32, worker, value >> 16 & 0xFFFF, -1)
            return self._grant(pool)

    def set_capacity(self, pool: int, replica: int, slots: int) -> set[int]:
        with self:
            cell = self._replica_cell(pool, replica)
            self._cells[cell] = slots
            self._cells[cell + 1] += 1
            return self._grant(pool)

    def generation(self, pool: int, replica: int) -> int:
        """How often the capacity has been set. No lock: the cell is read at once."""
        return self._cells[self._replica_cell(pool, replica) + 1]

    def suspend(self, pool: int, replica: int, generation: int) -> bool:
        """Lease no more slots of a replica until its capacity is set again; False if that has been done."""
        with self:
            cell = self._replica_cell(pool, replica)
            if self._cells[cell + 1] != generation or self._cells[cell] == 0:
                return False
            self._cells[cell] = 0
            return True

    def load(self, pool: int) -> list[tuple[int, int]]:
        """(slots in use, slots in all) of each replica. No lock: good enough to choose by."""
        return [
            (self._used(pool, replica), self._cells[self._replica_cell(pool, replica)])
            for replica in range(self._replicas[pool])
        ]

    def forget_worker(self, worker: int) -> set[int]:
        """Take back all that a dead worker held or waited for."""
        woken: set[int] = set()
        with self:
            for pool, replicas in enumerate(self._replicas):
                base = self._base[pool]
                for replica in range(replicas):
                    self._cells[self._lease_cell(pool, replica, worker)] = 0
                keys = self._key_cell(pool, worker, 0)
                self._cells[keys : keys + KEYS] = self._no_leases
                for ticket in range(self._cells[base + HEAD], self._cells[base + TAIL]):
                    cell = self._ticket_cell(pool, ticket)
                    if self._cells[cell] & 0xFFFF == WAITING | worker << 8:
                        self._cells[cell] = GONE
                # Counted anew: the worker may have died between a ticket and its count.
                self._cells[base + LIVE] = len(self._waiting(pool))
                woken |= self._grant(pool)
        return woken

    def usage(self, pool: int) -> tuple[int, int, int]:
        """(slots in use, slots in all, requests waiting)."""
        with self:
            replicas = range(self._replicas[pool])
            used = sum(self._used(pool, replica) for replica in replicas)
            slots = sum(self._cells[self._replica_cell(pool, replica)] for replica in replicas)
            return used, slots, self._cells[self._base[pool] + LIVE]

    def _replica_cell(self, pool: int, replica: int) -> int:
        return self._base[pool] + REPLICAS + replica * self._stride

    def _lease_cell(self, pool: int, replica: int, worker: int) -> int:
        return self._replica_cell(pool, replica) + 2 + worker

    def _key_cell(self, pool: int, worker: int, key: int) -> int:
        return self._replica_cell(pool, self._replicas[pool]) + worker * KEYS + key

    def _ticket_cell(self, pool: int, ticket: int) -> int:
        return self._turn_cell(pool, KEYS) + ticket % QUEUE

    def _turn_cell(self, pool: int, key: int) -> int:
        return self._key_cell(pool, self._workers, key)

    def _take_turn(self, pool: int, key: int) -> None:
        turn = self._cells[self._base[pool] + TURN] = self._cells[self._base[pool] + TURN] + 1
        self._cells[self._turn_cell(pool, key)] = turn

    def _lease(self, pool: int, replica: int, worker: int, key: int, change: int) -> None:
        self._cells[self._lease_cell(pool, replica, worker)] += change
        self._cells[self._key_cell(pool, worker, key)] += change

    def _leases_of(self, pool: int, key: int) -> int:
        """Slots that a key has, over all workers."""
        first = self._key_cell(pool, 0, key)
        return sum(self._cells[first : first + self._workers * KEYS : KEYS])

    def _share(self, pool: int, key: int) -> tuple[int, int]:
        """What a key has had; less comes first."""
        return self._leases_of(pool, key), self._cells[self._turn_cell(pool, key)]

    def _waiting(self, pool: int) -> list[tuple[int, int]]:
        """(ticket, its cell's value) of all that wait, oldest first."""
        base = self._base[pool]
        head, tail = self._cells[base + HEAD], self._cells[base + TAIL]
        first = self._ticket_cell(pool, 0)
        start, count = head % QUEUE, tail - head
        values = self._cells[first + start : first + min(start + count, QUEUE)].tolist()
        if start + count > QUEUE:
            values += self._cells[first : first + start + count - QUEUE].tolist()
        return [(head + place, value) for place, value in enumerate(values) if value & 0xFF == WAITING]

    def _used(self, pool: int, replica: int) -> int:
        first = self._replica_cell(pool, replica) + 2
        return sum(self._cells[first : first + self._workers])

    def _free_replica(self, pool: int, order: Sequence[int] = ()) -> int:
        """The first of `order` that has a free slot, else the replica with the most, or -1."""
        for replica in order:
            if self._cells[self._replica_cell(pool, replica)] > self._used(pool, replica):
                return replica
        best, most = -1, 0
        for replica in range(self._replicas[pool]):
            free = self._cells[self._replica_cell(pool, replica)] - self._used(pool, replica)
            if free > most:
                best, most = replica, free
        return best

    def _grant(self, pool: int) -> set[int]:
        """Give what is free to those who wait; the workers to wake."""
        woken: set[int] = set()
        base = self._base[pool]
        while self._cells[base + LIVE] > 0:
            replica = self._free_replica(pool)
            if replica < 0:
                return woken
            ticket, value = self._next(pool, replica)
            worker, key = value >> 8 & 0xFF, value >> 16 & 0xFFFF
            first = self._first
            self._cells[first + POOL] = pool
            self._cells[first + REPLICA] = replica
            self._cells[first + LEASES] = self._cells[self._lease_cell(pool, replica, worker)] + 1
            self._cells[first + KEY_LEASES] = self._cells[self._key_cell(pool, worker, key)] + 1
            self._cells[first] = ticket + 1
            self._finish_grant()
            self._take_turn(pool, key)
            woken.add(worker)
        self._cells[base + HEAD] = self._cells[base + TAIL]
        return woken

    def _finish_grant(self) -> None:
        """Do what the first cells say; to do it again, after a death in its middle, is no harm."""
        cells, first = self._cells, self._first
        pool, replica = cells[first + POOL], cells[first + REPLICA]
        cell = self._ticket_cell(pool, cells[first] - 1)
        value = cells[cell]
        worker, key = value >> 8 & 0xFF, value >> 16 & 0xFFFF
        cells[self._lease_cell(pool, replica, worker)] = cells[first + LEASES]
        cells[self._key_cell(pool, worker, key)] = cells[first + KEY_LEASES]
        if value & 0xFF == WAITING:
            cells[self._base[pool] + LIVE] -= 1
        cells[cell] = GRANTED | value & 0xFFFFFF00 | replica << 32
        cells[first] = 0

    def _next(self, pool: int, replica: int) -> tuple[int, int]:
        """(ticket, its cell's value) of who gets the next slot, which is one of this replica."""
        waiting = self._waiting(pool)
        base = self._base[pool]
        self._cells[base + HEAD] = waiting[0][0]
        if self._cells[base + TAIL] - waiting[0][0] > PASSED_OVER:
            return waiting[0]
        homes_count = self._cells[base + TAIL] - waiting[0][0] <= HOMES_COUNT
        # Of each key the oldest ticket, and the oldest whose home this is.
        best: dict[tuple[int, bool], tuple[int, int]] = {}
        for entry in waiting:
            value = entry[1]
            if value & URGENT:
                return entry
            at_home = homes_count and value >> HOME == replica + 1
            best.setdefault((value >> 16 & 0xFFFF, at_home), entry)

        def rank(choice: tuple[int, bool]) -> tuple[int, bool, int, int]:
            key, at_home = choice
            leases, turn = self._share(pool, key)
            return leases, not at_home, turn, best[choice][0]

        return best[min(best, key=rank)]

    def _displace(self, pool: int, key: int) -> frozenset[int]:
        """Make room for a ticket of `key`; the worker to wake. Raises RateLimited if nobody holds more."""
        waiting = [entry for entry in self._waiting(pool) if not entry[1] & URGENT]
        holds = Counter(value >> 16 & 0xFFFF for _, value in waiting)
        for other in {*holds, key}:
            holds[other] += self._leases_of(pool, other)
        most = max((value >> 16 & 0xFFFF for _, value in waiting), key=holds.__getitem__, default=key)
        # Not if the two would only change places.
        if holds[key] + 1 >= holds[most]:
            raise self._full(pool)
        ticket, value = next(entry for entry in reversed(waiting) if entry[1] >> 16 & 0xFFFF == most)
        self._cells[self._ticket_cell(pool, ticket)] = DISPLACED
        self._cells[self._base[pool] + LIVE] -= 1
        return frozenset((value >> 8 & 0xFF,))

    def _full(self, pool: int) -> RateLimited:
        return RateLimited(
            "Too many requests are waiting for this model. Please retry later.",
            code="queue_full",
            retry_after=self._wait_estimate(pool),
        )

    def _wait_estimate(self, pool: int) -> float:
        """Seconds until a new request would get a slot, at the recent pace."""
        slots = sum(self._cells[self._replica_cell(pool, r)] for r in range(self._replicas[pool]))
        waiting = self._cells[self._base[pool] + LIVE] + 1
        return max(1.0, math.ceil(self._floats[self._base[pool] + SECONDS] * waiting / max(1, slots)))


class Lease:
    """One slot of one replica, to be given back exactly once."""

    __slots__ = ("_leases", "_since", "generation", "key", "pool", "replica")

    def __init__(self, leases: Leases, pool: int, replica: int, key: int, generation: int) -> None:
        self._leases: Leases | None = leases
        self._since = time.monotonic()
        self.generation = generation
        self.pool = pool
        self.replica = replica
        self.key = key

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

    async def acquire(
        self, pool: int, key: int = 0, *, urgent: bool = False, order: Sequence[int] = (), home: int = -1
    ) -> Lease:
        """Wait for a slot for the key with this number; the rest as in `SlotTable.acquire`.

        Raises RateLimited if the queue is full, or if the place in it must go to a key that holds less;
        EngineTimeout after too long in it.
        """
        replica, ticket, woken = self._table.acquire(
            pool, self._worker, self._max_queue, key, urgent=urgent, order=order, home=home
        )
        wake(self._wake_fds, woken)
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
        # Read before anything is sent to the replica: what fails from now on is of this generation, or later.
        return Lease(self, pool, replica, key, self._table.generation(pool, replica))

    def give_back(self, lease: Lease, seconds: float) -> None:
        woken = self._table.release(lease.pool, lease.replica, self._worker, seconds, lease.key)
        wake(self._wake_fds, woken)

    def suspend(self, lease: Lease) -> bool:
        """Whoever waits gets no slot of this lease's replica; False if the supervisor knows already."""
        return self._table.suspend(lease.pool, lease.replica, lease.generation)

    def load(self, pool: int) -> list[tuple[int, int]]:
        return self._table.load(pool)

    def full(self, pool: int) -> bool:
        """Whether as many requests wait as may."""
        return self._table.usage(pool)[2] >= self._max_queue

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
        if waiter.done():
            return
        if replica >= 0:
            waiter.set_result(replica)
        elif self._table.displaced(pool, ticket):
            waiter.set_exception(self._table.full(pool))


def wake(fds: Sequence[int], workers: Iterable[int]) -> None:
    """Write a byte to each worker's pipe; a full pipe already holds a wake-up."""
    for worker in workers:
        with suppress(BlockingIOError):
            os.write(fds[worker], b"!")
