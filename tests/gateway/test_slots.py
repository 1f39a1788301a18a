"""Slots are leased in order of arrival, never twice, and come back from the dead."""

import asyncio
import os
import random

import pytest

from deepseek_api_compat.errors import RateLimited
from deepseek_api_compat.gateway import slots
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
    assert table.acquire(0, 0, 10)[:2] == (-1, 0)


def test_the_queue_is_in_order_of_arrival_over_workers(table):
    table.set_capacity(0, 0, 1)
    assert table.acquire(0, 0, 10)[:2] == (0, -1)
    tickets = [(worker, table.acquire(0, worker, 10)[1]) for worker in (2, 1, 2)]
    for worker, ticket in tickets:
        assert table.granted(0, ticket) == -1
        assert table.release(0, 0, 0 if ticket == 0 else tickets[ticket - 1][0], 1.0) == {worker}
        assert table.granted(0, ticket) == 0


def test_who_leaves_the_queue_is_passed_over(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10)
    _, first, _ = table.acquire(0, 1, 10)
    _, second, _ = table.acquire(0, 2, 10)
    assert table.cancel(0, first, 1) == set()
    assert table.release(0, 0, 0, 1.0) == {2}
    assert table.granted(0, second) == 0


def test_leaving_with_a_slot_just_granted_passes_it_on(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10)
    _, first, _ = table.acquire(0, 1, 10)
    _, second, _ = table.acquire(0, 2, 10)
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
    _, ticket, _ = table.acquire(0, 2, 10)
    assert table.usage(0) == (2, 2, 2)
    assert table.forget_worker(1) == {2}
    assert table.granted(0, ticket) == 0
    assert table.usage(0) == (1, 2, 0)


def test_capacity_that_arrives_serves_the_queue(table):
    _, ticket, _ = table.acquire(1, 0, 10)
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
            replica, ticket, _ = table.acquire(0, worker, 20)
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
    await asyncio.wait_for(asyncio.gather(*tasks), 30)
    assert order == [1, 2, 0]
    assert table.usage(0) == (0, 1, 0)
    for read, write in pipes:
        asyncio.get_running_loop().remove_reader(read)
        os.close(read)
        os.close(write)


def queue(table, *keys, worker=0, max_queue=100):
    """Tickets of requests by these keys, in this order."""
    return [table.acquire(0, worker, max_queue, key).ticket for key in keys]


def granted(table, tickets):
    return [ticket for ticket in tickets if table.granted(0, ticket) >= 0]


def test_a_free_slot_goes_to_the_key_with_the_fewest(table):
    table.set_capacity(0, 0, 2)
    table.acquire(0, 0, 10, 1)
    table.acquire(0, 1, 10, 1)
    flood, quiet, late = queue(table, 1, 2, 1)
    table.release(0, 0, 0, 1.0, 1)
    assert granted(table, [flood, quiet, late]) == [quiet]
    table.release(0, 0, 1, 1.0, 1)
    assert granted(table, [flood, quiet, late]) == [flood, quiet]


def test_keys_with_equally_many_are_served_in_order_of_arrival(table):
    tickets = queue(table, 5, 5, 3, 3, 4)
    table.set_capacity(0, 0, 3)
    assert granted(table, tickets) == [tickets[0], tickets[2], tickets[4]]
    table.set_capacity(0, 0, 5)
    assert granted(table, tickets) == tickets


def test_a_key_does_not_pass_on_its_slot_to_itself_while_another_waits(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10, 1)
    flood, more, quiet = queue(table, 1, 1, 2)
    table.release(0, 0, 0, 1.0, 1)
    assert granted(table, [flood, more, quiet]) == [quiet]
    table.release(0, 0, 0, 1.0, 2)
    assert granted(table, [flood, more, quiet]) == [flood, quiet]


def test_leases_of_a_key_count_over_all_workers_and_not_those_of_the_dead(table):
    table.set_capacity(0, 0, 3)
    for worker in range(3):
        table.acquire(0, worker, 10, 1 if worker else 2)
    one, two = queue(table, 1, 2)
    table.release(0, 0, 0, 1.0, 2)
    assert granted(table, [one, two]) == [two]
    (again,) = queue(table, 2)
    table.forget_worker(1)
    assert granted(table, [one, two, again]) == [one, two]
    table.forget_worker(2)
    assert granted(table, [one, two, again]) == [one, two, again]
    assert table.usage(0) == (3, 3, 0)


def test_a_full_queue_makes_room_for_a_quiet_key(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 4, 1)
    flood = queue(table, 1, 1, 1, 1, worker=2, max_queue=4)
    place = table.acquire(0, 1, 4, 2)
    assert place.woken == {2}
    assert [table.displaced(0, ticket) for ticket in flood] == [False, False, False, True]
    with pytest.raises(RateLimited):
        table.acquire(0, 2, 4, 1)
    # Keys that hold almost equally many don't push each other out.
    second = table.acquire(0, 1, 4, 2)
    assert table.displaced(0, flood[2])
    with pytest.raises(RateLimited):
        table.acquire(0, 1, 4, 2)
    assert table.cancel(0, flood[3], 2) == set()
    assert table.usage(0) == (1, 1, 4)
    assert not table.displaced(0, second.ticket)


def test_nobody_is_passed_over_for_ever(table):
    table.set_capacity(0, 0, 2)
    table.acquire(0, 0, 10, 1)
    table.acquire(0, 0, 10, 9)
    (old,) = queue(table, 1)
    passed_over = 0
    while not granted(table, [old]):
        (other,) = queue(table, 9)
        table.release(0, 0, 0, 0.1, 9)
        passed_over += bool(granted(table, [other]))
        assert passed_over <= slots.PASSED_OVER
    assert passed_over > slots.PASSED_OVER - 3


@pytest.mark.parametrize("cell", range(5))
def test_a_grant_that_death_interrupts_is_finished_by_the_next(table, memory, cell):
    """The releasing worker dies after so many of the writes with which it grants the slot."""
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 10, 1)
    (ticket,) = queue(table, 2, worker=1)

    class Died(BaseException):
        pass

    class Mortal:
        """The cells, of one who dies before write number `left`."""

        def __init__(self, cells, left):
            self.cells = cells
            self.left = left

        def __getitem__(self, index):
            return self.cells[index]

        def __setitem__(self, index, value):
            if self.counting and self.left == 0:
                raise Died
            self.left -= self.counting
            self.cells[index] = value

        counting = False

    dying = SlotTable(memory, 0, [2, 1], 3)
    dying._cells = cells = Mortal(memory.ints, cell)
    finish = dying._finish_grant

    def finish_until_death():
        cells.counting = True
        finish()

    dying._finish_grant = finish_until_death
    with pytest.raises(Died):
        dying.release(0, 0, 0, 1.0, 1)
    table.forget_worker(0)
    assert granted(table, [ticket]) == [ticket]
    assert table.usage(0) == (1, 1, 0)
    table.release(0, 0, 1, 1.0, 2)
    assert table.usage(0) == (0, 1, 0)


async def test_who_is_displaced_is_told(memory, table):
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    leases = Leases(table, 0, [write], read, max_queue=2)
    leases.start(asyncio.get_running_loop())
    table.set_capacity(0, 0, 1)
    first = await leases.acquire(0, 1)
    waiting = [asyncio.create_task(leases.acquire(0, 1)) for _ in range(2)]
    await asyncio.sleep(0)
    quiet = asyncio.create_task(leases.acquire(0, 2))
    with pytest.raises(RateLimited) as caught:
        await waiting[1]
    assert caught.value.code == "queue_full"
    first.release()
    # The key that has had no slot yet comes first.
    (await asyncio.wait_for(quiet, 30)).release()
    (await asyncio.wait_for(waiting[0], 30)).release()
    assert table.usage(0) == (0, 1, 0)
    asyncio.get_running_loop().remove_reader(read)
    os.close(read)
    os.close(write)


def test_an_answer_that_lost_its_engine_comes_first_and_is_never_refused(table):
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 3)
    waiting = [table.acquire(0, 0, 3, key=key).ticket for key in (1, 1, 2)]
    with pytest.raises(RateLimited):
        table.acquire(0, 0, 3, key=1)
    urgent = [table.acquire(0, 0, 3, key=1, urgent=True).ticket for _ in range(2)]
    # A key that holds less gets in at the cost of the newest ticket of key 1 that is not urgent.
    table.acquire(0, 0, 3, key=3)
    assert table.displaced(0, waiting[1])
    for ticket in urgent:
        assert table.granted(0, ticket) == -1
        table.release(0, 0, 0, 1.0)
        assert table.granted(0, ticket) == 0


def test_a_replica_that_failed_is_leased_no_more_until_its_capacity_is_set_again(table):
    table.set_capacity(0, 0, 2)
    before = table.generation(0, 0)
    assert table.acquire(0, 0, 10).replica == 0
    assert table.suspend(0, 0, before)
    assert not table.suspend(0, 0, before), "once is enough"
    ticket = table.acquire(0, 1, 10).ticket
    assert table.granted(0, ticket) == -1
    assert table.set_capacity(0, 0, 2) == {1}
    assert table.granted(0, ticket) == 0
    assert not table.suspend(0, 0, before), "what failed was the one before"
    assert table.load(0) == [(2, 2), (0, 0)]


def test_replicas_are_tried_in_the_order_that_is_asked_for(table):
    table.set_capacity(0, 0, 5)
    table.set_capacity(0, 1, 1)
    assert [table.acquire(0, 0, 10, order=(1, 0)).replica for _ in range(2)] == [1, 0]


def test_a_freed_slot_goes_to_who_is_at_home_there_among_equals(table):
    table.set_capacity(0, 0, 1)
    table.set_capacity(0, 1, 1)
    for replica in (0, 1):
        assert table.acquire(0, 0, 9, order=(replica,)).replica == replica
    first = table.acquire(0, 0, 9, key=1, home=1).ticket
    second = table.acquire(0, 0, 9, key=2, home=0).ticket
    third = table.acquire(0, 0, 9, key=2, home=1).ticket
    table.release(0, 0, 0, 1.0)
    assert [table.granted(0, ticket) for ticket in (first, second, third)] == [-1, 0, -1]
    # Key 2 has a slot now: home or not, key 1 has less.
    table.release(0, 1, 0, 1.0)
    assert [table.granted(0, ticket) for ticket in (first, second, third)] == [1, 0, -1]


def test_homes_don_t_count_when_somebody_waits_for_long(table, monkeypatch):
    monkeypatch.setattr(slots, "HOMES_COUNT", 3)
    table.set_capacity(0, 0, 1)
    table.acquire(0, 0, 9)
    stranger = table.acquire(0, 0, 9, home=1).ticket
    for _ in range(3):
        table.acquire(0, 0, 9, home=0)
    table.release(0, 0, 0, 1.0)
    assert table.granted(0, stranger) == 0
