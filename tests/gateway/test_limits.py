"""Rates hold exactly, over processes too, and a refused request costs nothing."""

import multiprocessing
import time

import pytest

from deepseek_api_compat.errors import RateLimited
from deepseek_api_compat.gateway.limits import RateLimiter
from deepseek_api_compat.gateway.shared import SharedMemory


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def memory():
    memory = SharedMemory.create(16)
    yield memory
    memory.close()


def limiter(memory, clock, rps=10.0, burst=1.0):
    return RateLimiter(memory, 0, default_rps=rps, burst_seconds=burst, clock=clock)


def test_a_burst_then_the_rate(memory):
    clock = Clock()
    limit = limiter(memory, clock)
    assert [limit.admit(1, None).remaining for _ in range(10)] == list(range(9, -1, -1))
    with pytest.raises(RateLimited) as caught:
        limit.admit(1, None)
    assert caught.value.retry_after == pytest.approx(0.1)
    clock.now += 0.1
    assert limit.admit(1, None).remaining == 0


def test_refusals_cost_nothing(memory):
    clock = Clock()
    limit = limiter(memory, clock)
    for _ in range(10):
        limit.admit(1, None)
    for _ in range(1000):
        with pytest.raises(RateLimited):
            limit.admit(1, None)
    clock.now += 1.0
    assert sum(limit.admit(1, None) is not None for _ in range(10)) == 10


def test_keys_have_rates_of_their_own(memory):
    limit = limiter(memory, Clock())
    limit.admit(1, 1.0)
    with pytest.raises(RateLimited):
        limit.admit(1, 1.0)
    assert limit.admit(2, 1.0).limit == 1
    assert [limit.admit(3, 0) for _ in range(100)] == [None] * 100


def test_a_slow_rate_still_admits_one(memory):
    limit = limiter(memory, Clock(), rps=0.1)
    assert limit.admit(1, None).remaining == 0
    with pytest.raises(RateLimited) as caught:
        limit.admit(1, None)
    assert caught.value.retry_after == pytest.approx(10.0)


def _hammer(fd: int, seconds: float, admitted) -> None:
    memory = SharedMemory(fd, 16)
    limit = RateLimiter(memory, 0, default_rps=200.0, burst_seconds=0.1)
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        try:
            limit.admit(1, None)
            count += 1
        except RateLimited:
            pass
    admitted.put(count)


def test_many_processes_share_one_rate(memory):
    fork = multiprocessing.get_context("fork")
    admitted = fork.Queue()
    began = time.monotonic()
    processes = [fork.Process(target=_hammer, args=(memory.fd, 1.0, admitted)) for _ in range(4)]
    for process in processes:
        process.start()
    total = sum(admitted.get() for _ in processes)
    for process in processes:
        process.join()
    assert total <= 200 * (time.monotonic() - began) + 21
    assert total >= 200 * 0.9
