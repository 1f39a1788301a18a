"""Slots are leased in order of arrival, never twice, and come back from the dead."""

import asyncio
import os
import random

import pytest

from deepseek_api_compat.errors import RateLimited
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.slots import Leases, SlotTable


@pytest.fixture
def memory():
    memory = SharedMemory.create(SlotTable.cells_for([2, 1], 3))
    yield memory
    memory.close()


@pytest.fixture
def table(memory):
    return SlotTable(memory, 0, [2, 1], 3)


def test_slots_go_to_the_replica_with_most_room(table):
    table.set_capacity(0, 0, 1)
    table.set_capacity(0, 1, 2)
    assert [table.acquire(0, 0, 10)[0] for _ in range(3)] in ([1, 0, 1], [1, 1, 0])
    assert table.acquire(0, 0, 10) == (-1, 0)


def test_the_queue_is_in_order_of_arrival_over_workers(table):
    table.set_capacity(0, 0, 1)
    assert table.acquire(0, 0, 10) == (0, -1)
    tickets = [(worker, table.acquire(0, worker, 10)[1]) for worker in (2, 1, 2)]
    for worker, ticket in tickets:
        assert table.granted(0, ticket) == -1
        assert table.release(0, 0, 0 if ticket == 0 else tickets[ticket - 1][0], 1.0) == {worker}
        assert table.granted(0, ticket) == 0


def test_who_leaves_the_queue_is_passed_over(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10)
    _, first = table.acquire(0, 1, 10)
    _, second = table.acquire(0, 2, 10)
    assert table.cancel(0, first, 1) == set()
    assert table.release(0, 0, 0, 1.0) == {2}
    assert table.granted(0, second) == 0


def test_leaving_with_a_slot_just_granted_passes_it_on(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10)
    _, first = table.acquire(0, 1, 10)
    _, second = table.acquire(0, 2, 10)
    table.release(0, 0, 0, 1.0)
    assert table.cancel(0, first, 1) == {2}
    assert table.granted(0, second) == 0
    assert table.usage(0) == (1, 1, 0)


def test_a_full_queue_says_how_long_to_wait(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 2)
    table.release(0, 0, 0, 8.0)
    table.acquire(0, 0, 2)
    table.acquire(0, 0, 2)
    table.acquire(0, 0, 2)
    with pytest.raises(RateLimited) as caught:
        table.acquire(0, 0, 2)
    assert caught.value.retry_after == 24.0


def test_a_dead_worker_gives_everything_back(table):
    table.set_capacity(0, 0, 2)
    table.acquire(0, 1, 10)
    table.acquire(0, 1, 10)
    table.acquire(0, 1, 10)
    _, ticket = table.acquire(0, 2, 10)
    assert table.usage(0) == (2, 2, 2)
    assert table.forget_worker(1) == {2}
    assert table.granted(0, ticket) == 0
    assert table.usage(0) == (1, 2, 0)


def test_capacity_that_arrives_serves_the_queue(table):
    _, ticket = table.acquire(1, 0, 10)
    assert table.set_capacity(1, 0, 4) == {0}
    assert table.granted(1, ticket) == 0


def test_random_traffic_never_oversubscribes(table):
    rng = random.Random(7)
    table.set_capacity(0, 0, 2)
    table.set_capacity(0, 1, 3)
    held: list[tuple[int, int]] = []
    queued: list[tuple[int, int]] = []
    for _ in range(5000):
        action = rng.random()
        if action < 0.5 and len(queued) < 20:
            worker = rng.randrange(3)
            replica, ticket = table.acquire(0, worker, 20)
            if ticket < 0:
                held.append((replica, worker))
            else:
                queued.append((ticket, worker))
        elif action < 0.85 and held:
            replica, worker = held.pop(rng.randrange(len(held)))
            table.release(0, replica, worker, 0.1)
        elif queued:
            ticket, worker = queued.pop(rng.randrange(len(queued)))
            table.cancel(0, ticket, worker)
        granted = [(ticket, worker) for ticket, worker in queued if table.granted(0, ticket) >= 0]
        for ticket, worker in granted:
            queued.remove((ticket, worker))
            held.append((table.granted(0, ticket), worker))
        assert [sum(1 for r, _ in held if r == replica) <= cap for replica, cap in ((0, 2), (1, 3))] == [
            True,
            True,
        ]
        assert table.usage(0) == (len(held), 5, len(queued))
        assert not queued or len(held) == 5, "nobody waits beside a free slot"


async def test_waiting_workers_are_woken_through_their_pipes(memory, table):
    table.set_capacity(0, 0, 1)
    pipes = [os.pipe() for _ in range(3)]
    for read, write in pipes:
        os.set_blocking(read, False)
        os.set_blocking(write, False)
    workers = [Leases(table, w, [write for _, write in pipes], pipes[w][0], max_queue=10) for w in range(3)]
    for worker in workers:
        worker.start(asyncio.get_running_loop())
    first = await workers[0].acquire(0)
    order: list[int] = []

    async def use(worker: int) -> None:
        lease = await workers[worker].acquire(0)
        order.append(worker)
        lease.release()

    tasks = [asyncio.create_task(use(worker)) for worker in (1, 2, 0)]
    leaver = asyncio.create_task(workers[1].acquire(0))
    await asyncio.sleep(0)
    leaver.cancel()
    first.release()
    first.release()  # giving back twice is giving back once
    await asyncio.wait_for(asyncio.gather(*tasks), 5)
    assert order == [1, 2, 0]
    assert table.usage(0) == (0, 1, 0)
    for read, write in pipes:
        asyncio.get_running_loop().remove_reader(read)
        os.close(read)
        os.close(write)
