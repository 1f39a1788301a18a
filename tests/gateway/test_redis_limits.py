"""Several machines count together; without Redis each goes on alone, and forgets nothing."""

import asyncio
import contextlib
import itertools
import logging
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deepseek_api_compat.config import LimitSettings, ModelLimitSettings, ModelSettings
from deepseek_api_compat.errors import ConfigError, InsufficientQuota
from deepseek_api_compat.gateway import redis_limits
from deepseek_api_compat.gateway.limits import OverLimit
from deepseek_api_compat.gateway.local_limits import LocalLimiter
from deepseek_api_compat.gateway.redis_limits import RedisLimiter
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.base import KeyLimits
from deepseek_api_compat.store.redis_counters import RedisCounters
from fakes import redis_server as servers

LIMITS = KeyLimits(rps=0, rpm=1000, tpm=1000, tpd=10_000, concurrency=10)
ALICE = Principal(id="alice", name="", role="user", index=1, limits=LIMITS, budget=1000)


@pytest.fixture
def keeps():
    """Whether the server still has its data when it comes back."""
    return False


@pytest.fixture
def server(keeps):
    """A server that the test may kill."""
    if servers.BINARY is None:
        pytest.skip("Redis is not installed: on Debian and Ubuntu, apt-get install redis-server")
    with TemporaryDirectory(dir="/tmp") as folder:
        server = servers.RedisServer(Path(folder), keeps=keeps)
        yield server
        server.kill()


class Machines:
    """Limiters of workers on machines of their own, which share nothing but the server."""

    def __init__(self, server):
        self._server = server
        self._names = itertools.count()
        self.made = []
        self.failures = 0
        self.lost = 0

    def machine(self):
        """The memory that the workers of a machine share."""
        return SharedMemory.create(LocalLimiter.cells_for(1, 2))

    def make(self, place=None, memory=None, worker=0):
        models = [ModelSettings(name="m", limits=ModelLimitSettings(tokens_per_minute=5000))]
        memory, limits = memory or self.machine(), LimitSettings(requests_per_second=0)
        local = LocalLimiter(memory, 0, limits, models, workers=2, worker=worker)
        number = next(self._names)
        counters = RedisCounters(self._server.url, place or f"machine{number}:0", str(number))
        limiter = RedisLimiter(local, counters, on_failure=self._fail, on_lost=self._lose)
        limiter.start()
        self.made.append(limiter)
        return limiter

    def _fail(self):
        self.failures += 1

    def _lose(self):
        self.lost += 1


@pytest.fixture
async def machines(server, monkeypatch):
    monkeypatch.setattr(redis_limits, "BEAT", 0.05)
    machines = Machines(server)
    yield machines
    for limiter in machines.made:
        await limiter.close()


async def spent(limiter):
    await limiter.settled()
    return (await limiter.usage("alice")).spent


async def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def until_usage(limiter, **wanted):
    deadline = time.monotonic() + 30
    while True:
        usage = await limiter.usage("alice")
        if all(getattr(usage, name) == value for name, value in wanted.items()):
            return
        assert time.monotonic() < deadline, usage
        await asyncio.sleep(0.01)


async def request(limiter, tokens=0, money=0):
    grant = await limiter.admit_request(ALICE)
    await grant.reserve(0, tokens, money)
    return grant


async def test_machines_share_a_limit(machines):
    one, other = machines.make(), machines.make()
    grants = [await request(machine, 250, 250) for machine in (one, other, one, other)]
    with pytest.raises(InsufficientQuota):
        await request(one, 1, 1)
    with pytest.raises(OverLimit):
        await request(other, 1, 0)
    for grant in grants:
        grant.settle(100, 100)
    await one.settled()
    await other.settled()
    assert await spent(one) == 400
    (await request(other, 600, 600)).settle(600, 600)
    assert await spent(other) == 1000
    assert (await one.usage("alice")).running == 0


async def test_requests_at_the_same_time_never_exceed(machines):
    made = [machines.make() for _ in range(3)]

    async def attempt(limiter):
        with contextlib.suppress(OverLimit):
            return await limiter.admit_request(ALICE)

    grants = await asyncio.gather(*(attempt(made[n % 3]) for n in range(60)))
    assert sum(grant is not None for grant in grants) == 10


async def test_without_redis_each_machine_goes_on_alone_and_tells_later(machines, server, caplog):
    caplog.set_level(logging.WARNING)
    limiter = machines.make()
    (await request(limiter, 100, 100)).settle(100, 100)
    assert await spent(limiter) == 100
    under_way = await request(limiter, 100, 100)
    server.kill()
    alone = await request(limiter, 100, 100)
    assert limiter.away
    assert machines.failures > 0
    alone.use(150, 150)
    alone.settle(200, 200)
    under_way.settle(300, 300)
    # 600 of 1000 are spent, and this machine knows.
    with pytest.raises(InsufficientQuota):
        await request(limiter, 1, 401)
    (await request(limiter, 1, 400)).give_back()
    # Comes back empty: what this machine knows is what all know.
    server.start()
    await until(lambda: not limiter.away)
    await limiter.settled()
    assert await spent(limiter) == 600
    assert limiter.local.usage(1).spent == 600
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]


@pytest.mark.parametrize("keeps", [True, False], ids=["with its data", "empty"])
async def test_what_workers_spent_alone_counts_once_whoever_tells_first(machines, server, keeps):
    memory = machines.machine()
    first, late = [machines.make(f"one:{worker}", memory, worker) for worker in range(2)]
    other = machines.make()
    workers = first, late, other
    for money, worker in zip((100, 50, 30), workers, strict=True):
        (await request(worker, money, money)).settle(money, money)
        await worker.settled()
    (await request(other, 0, 0)).give_back()  # all have heard of 180
    (await request(first, 0, 0)).give_back()
    under_way = [await request(worker, 40, 40) for worker in workers]
    for worker in workers:
        await worker.settled()
    server.kill()
    await until(lambda: all(worker.away for worker in workers))
    for money, worker, grant in zip((7, 11, 13), workers, under_way, strict=True):
        (await request(worker, money, money)).settle(money, money)
        grant.settle(2 * money, 2 * money)
    assert first.local.usage(1).spent == 180 + 3 * (7 + 11)
    async with late._sending:  # the others tell, and admit, before this one does
        server.start()
        await until(lambda: not first.away and not other.away)
        for worker in (first, other, first):
            (await request(worker, 1, 1)).settle(1, 1)
            await worker.settled()
        assert await spent(first) == 180 + 3 * (7 + 13) + 3
        assert first.local.usage(1).spent == 180 + 3 * (7 + 11 + 13) + 3
    await until(lambda: not late.away)
    wanted = 180 + 3 * (7 + 11 + 13) + 3
    assert await spent(late) == wanted
    for worker in workers:
        (await request(worker, 0, 0)).give_back()
        await worker.settled()
        assert worker.local.usage(1).spent == worker.local.usage(1).tokens_today == wanted
    usage = await first.usage("alice")
    assert (usage.running, usage.reserved, usage.spent, usage.tokens_today) == (0, 0, wanted, wanted)


@pytest.mark.parametrize("keeps", [True], ids=["with its data"])
async def test_what_is_under_way_stays_reserved_while_redis_is_away_for_long(machines, server, monkeypatch):
    monkeypatch.setattr(redis_limits, "PATIENCE", 0.3)
    one, other = machines.make(), machines.make()
    grant = await request(one, 500, 500)
    server.kill()
    await until(lambda: one.away and other.away)
    await asyncio.sleep(0.6)
    server.start()
    await until(lambda: not one.away and not other.away)
    assert (await one.usage("alice")).reserved == 500
    with pytest.raises(InsufficientQuota):
        await request(other, 1, 501)
    grant.settle(300, 300)
    assert await spent(one) == 300
    await until_usage(other, running=0, reserved=0, spent=300)


async def test_what_was_used_while_redis_hung_is_told_once(machines, server):
    limiter = machines.make()
    grants = [await request(limiter, 10, 10) for _ in range(5)]
    server.pause()
    for grant in grants:
        grant.settle(20, 20)
    lonely = await request(limiter, 10, 10)
    lonely.settle(30, 30)
    assert limiter.away
    server.go_on()
    await until(lambda: not limiter.away)
    assert await spent(limiter) == 130
    usage = await limiter.usage("alice")
    assert (usage.running, usage.reserved, usage.tokens_today) == (0, 0, 130)


async def test_a_hanging_redis_delays_nobody_for_long(machines, server):
    limiter = machines.make()
    await request(limiter)
    server.pause()
    began = time.monotonic()
    await asyncio.gather(*(request(limiter) for _ in range(5)))
    await request(limiter)
    assert time.monotonic() - began < 5, "it hangs for ever"
    server.go_on()


async def test_more_than_fits_is_counted_as_lost(machines, server, monkeypatch):
    monkeypatch.setattr(redis_limits, "MAX_WAITING", 3)
    limiter = machines.make()
    await request(limiter)
    server.kill()
    for _ in range(5):
        (await request(limiter, 10, 10)).settle(10, 10)
    assert machines.lost >= 2
    server.start()
    await until(lambda: not limiter.away)
    await limiter.settled()


async def test_a_successor_gives_back_what_a_dead_worker_had(machines):
    other, dead = machines.make(), machines.make("machine:1")
    await request(dead, 500, 500)
    await dead.settled()
    await kill(dead)
    await until_usage(other, running=1, reserved=500)
    machines.make("machine:1")
    await until_usage(other, running=0, reserved=0, spent=0)
    (await request(other, 1000, 1000)).give_back()


async def test_a_dead_machine_is_forgotten(machines, monkeypatch):
    monkeypatch.setattr(redis_limits, "PATIENCE", 0.3)
    other, dead = machines.make(), machines.make()
    grant = await request(dead, 500, 500)
    await asyncio.sleep(0.6)
    assert (await other.usage("alice")).running == 1  # silent it is not
    await kill(dead)
    await until_usage(other, running=0, reserved=0)
    # It was not dead after all: what it used counts, once.
    dead._closing = False
    dead.start()
    grant.settle(300, 300)
    assert await spent(dead) == 300
    assert (await other.usage("alice")).running == 0


async def kill(limiter):
    """Its worker stops without a word."""
    limiter._closing = True
    for task in limiter._tasks:
        task.cancel()
    await asyncio.gather(*limiter._tasks, return_exceptions=True)


async def test_a_client_that_leaves_while_its_request_is_admitted_leaves_nothing(machines):
    limiter = machines.make()
    await request(limiter)
    for delay in (0, 0.0001, 0.0003, 0.0006, 0.001, 0.002) * 5:
        task = asyncio.create_task(request(limiter, 10, 10))
        await asyncio.sleep(delay)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            (await task).give_back()
    await until_usage(limiter, running=1, reserved=0, spent=0)


async def test_what_a_dead_worker_had_used_is_charged_to_all(machines):
    worker, supervisor, other = machines.make("one:0"), machines.make("one:supervisor"), machines.make()
    await request(worker, 100, 900)
    with pytest.raises(InsufficientQuota):
        await request(other, 1, 200)
    await kill(worker)
    machines.make("one:0")  # its successor gives back what was reserved
    supervisor.charge("alice", 1, 0, tokens=60, money=700)
    await until_usage(other, running=0, reserved=0, spent=700, tokens_today=60)
    with pytest.raises(InsufficientQuota):
        await request(other, 1, 301)
    (await request(other, 1, 300)).give_back()


async def test_what_is_charged_while_redis_is_away_is_told_when_it_is_back(machines, server):
    limiter = machines.make()
    (await request(limiter, 1, 1)).settle(1, 1)
    await limiter.settled()
    server.kill()
    await until(lambda: limiter.away)
    limiter.charge("alice", 1, 0, tokens=60, money=700)
    assert limiter.local.usage(1).spent == 701, "this machine knows at once"
    limiter.charge("gone", None, None, tokens=5, money=5)  # a key and a model that were deleted
    server.start()
    await until(lambda: not limiter.away)
    assert (await limiter.usage("alice")).spent == 701


async def test_a_deleted_key_leaves_nothing(machines):
    limiter = machines.make()
    (await request(limiter, 10, 10)).settle(10, 10)
    assert await spent(limiter) == 10
    await limiter.forget_key("alice")
    assert await spent(limiter) == 0


def test_a_url_that_makes_no_sense_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"limits\.redis_url"):
        RedisCounters("http://nowhere", "machine:0", "1")
