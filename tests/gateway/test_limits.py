"""Limits hold exactly, over processes too; a refusal costs nothing, a settlement what was used."""

import itertools
import multiprocessing
import os
import random
import signal
import time

import msgspec
import pytest
import redis

from deepseek_api_compat.config import LimitSettings, ModelLimitSettings, ModelSettings
from deepseek_api_compat.errors import EngineUnavailable, InsufficientQuota, RateLimited
from deepseek_api_compat.gateway import local_limits
from deepseek_api_compat.gateway.limits import OverLimit
from deepseek_api_compat.gateway.local_limits import LocalLimiter
from deepseek_api_compat.gateway.redis_limits import RedisLimiter
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.windows import EXACT
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store import redis_counters
from deepseek_api_compat.store.base import KeyLimits
from deepseek_api_compat.store.redis_counters import RedisCounters

NOON = 20_000 * 86400 + 43200.0
NONE = LimitSettings(requests_per_second=0)


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wall(self) -> float:
        return NOON - 1000.0 + self.now


@pytest.fixture
def memory():
    memory = SharedMemory.create(LocalLimiter.cells_for(2, 3))
    yield memory
    memory.close()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_local(memory, clock):
    """A limiter of worker `worker`; the settings of model 0 as given, model 1 without limits."""

    def make(limits=NONE, model=None, worker=0):
        models = [
            ModelSettings(name="first", limits=model or ModelLimitSettings()),
            ModelSettings(name="second"),
        ]
        return LocalLimiter(memory, 0, limits, models, workers=3, worker=worker, clock=clock, wall=clock.wall)

    return make


@pytest.fixture(params=["local", "redis"])
async def make(request, make_local, clock, monkeypatch):
    """The same promises from one machine's shared memory and from a real Redis."""
    if request.param == "local":
        yield make_local
        return
    server = request.getfixturevalue("redis_server")
    redis.Redis.from_url(server.url).flushall()
    monkeypatch.setattr(redis_counters, "TIMEOUT", 10.0)  # a busy machine is not what is tested here
    made, names = [], itertools.count()

    def make(limits=NONE, model=None, worker=0):
        counters = RedisCounters(server.url, f"machine:{worker}", str(next(names)))
        made.append(RedisLimiter(make_local(limits, model, worker), counters, clock=clock.wall))
        made[-1].start()
        return made[-1]

    yield make
    for limiter in made:
        await limiter.close()


async def settled(limiter):
    """Until everything that a grant was told is counted."""
    if isinstance(limiter, RedisLimiter):
        await limiter.settled()


async def usage(limiter):
    """What is counted of key 1."""
    if isinstance(limiter, LocalLimiter):
        return limiter.usage(1)
    await limiter.settled()
    return await limiter.usage("key1")


def key(slot=1, budget=None, **limits):
    return Principal(
        id=f"key{slot}", name="", role="user", index=slot, limits=KeyLimits(**limits), budget=budget
    )


async def refusal(limiter, principal, model=0, tokens=0, money=0):
    """The error that a request meets, or None; what is admitted is settled as it was reserved."""
    await settled(limiter)
    try:
        grant = await limiter.admit_request(principal)
        await grant.reserve(model, tokens, money)
    except (RateLimited, InsufficientQuota) as error:
        return error
    grant.settle(tokens, money)
    await settled(limiter)
    return None


async def test_a_burst_then_the_rate(make, clock):
    limiter, alice = make(LimitSettings(requests_per_second=10)), key()
    seen = []
    for _ in range(10):
        seen.append((await limiter.admit_request(alice)).requests.remaining)
        clock.now += 0.01
    assert seen == list(range(9, -1, -1))
    with pytest.raises(OverLimit) as caught:
        await limiter.admit_request(alice)
    assert caught.value.retry_after == pytest.approx(0.9)
    assert (caught.value.code, caught.value.requests.limit) == ("rate_limit_exceeded", 10)
    assert caught.value.requests.remaining == 0
    assert caught.value.requests.reset == pytest.approx(0.99)
    clock.now += 0.9
    assert (await limiter.admit_request(alice)).requests.remaining == 0


async def test_refusals_cost_nothing(make, clock):
    limiter, alice = make(LimitSettings(requests_per_second=10)), key()
    for _ in range(10):
        await limiter.admit_request(alice)
    for _ in range(1000):
        with pytest.raises(RateLimited):
            await limiter.admit_request(alice)
    clock.now += 1.0
    for _ in range(10):
        await limiter.admit_request(alice)


async def test_keys_have_limits_of_their_own(make):
    limiter = make(LimitSettings(requests_per_second=10))
    assert await refusal(limiter, key(1, rps=1)) is None
    assert await refusal(limiter, key(1, rps=1)) is not None
    assert await refusal(limiter, key(2, rps=1)) is None
    assert [await refusal(limiter, key(3, rps=0)) for _ in range(100)] == [None] * 100
    assert [await refusal(limiter, key(4, rps=1, burst=5)) for _ in range(5)] == [None] * 5
    assert (await refusal(limiter, key(4, rps=1, burst=5))).retry_after == pytest.approx(5)


async def test_a_changed_limit_holds_at_once(make):
    limiter = make()
    assert await refusal(limiter, key(rpm=1)) is None
    assert (await refusal(limiter, key(rpm=1))).code == "requests_per_minute_exceeded"
    assert await refusal(limiter, key(rpm=2)) is None
    assert await refusal(limiter, key(budget=5), money=5) is None
    assert (await refusal(limiter, key(budget=5), money=1)).status == 402
    assert await refusal(limiter, key(budget=6), money=1) is None


# name, key, model limits, what a request needs, how many fit at once
LIMITS = [
    ("rate_limit_exceeded", {"rps": 100}, {}, 0, 100),
    ("rate_limit_exceeded", {"rps": 0.2}, {}, 0, 1),
    ("rate_limit_exceeded", {"rps": 2.5}, {}, 0, 2),
    ("rate_limit_exceeded", {"rps": 200}, {}, 0, 200),
    ("requests_per_minute_exceeded", {"rpm": 7}, {}, 0, 7),
    ("requests_per_minute_exceeded", {"rpm": 300}, {}, 0, 300),
    ("tokens_per_minute_exceeded", {"tpm": 1000}, {}, 90, 11),
    ("tokens_per_minute_exceeded", {"tpm": 100_000}, {}, 90, 1111),
    ("tokens_per_day_exceeded", {"tpd": 1000}, {}, 90, 11),
    ("model_requests_per_second_exceeded", {}, {"requests_per_second": 4.0}, 0, 4),
    ("model_requests_per_minute_exceeded", {}, {"requests_per_minute": 4}, 0, 4),
    ("model_tokens_per_minute_exceeded", {}, {"tokens_per_minute": 1000}, 90, 11),
    ("model_tokens_per_day_exceeded", {}, {"tokens_per_day": 1000}, 90, 11),
]


@pytest.mark.parametrize(("code", "own", "model", "tokens", "fit"), LIMITS)
async def test_waiting_as_long_as_told_is_enough_and_not_too_long(make, clock, code, own, model, tokens, fit):
    limiter, alice = make(model=ModelLimitSettings(**model)), key(**own)
    rng = random.Random(3)
    admitted = 0
    while (error := await refusal(limiter, alice, tokens=tokens)) is None:
        admitted += 1
        clock.now += rng.random() / 10_000
    assert (admitted, error.code) == (fit, code)
    for _ in range(5):
        before = clock.now
        if error.retry_after > 1e-4:  # times are exact to a microsecond
            clock.now += error.retry_after * 0.9
            assert await refusal(limiter, alice, tokens=tokens) is not None
        clock.now = before + error.retry_after
        assert await refusal(limiter, alice, tokens=tokens) is None
        while (error := await refusal(limiter, alice, tokens=tokens)) is None:
            clock.now += rng.random() / 10_000


@pytest.mark.parametrize("limit", [7, 130])
async def test_no_span_holds_more_than_the_limit(make, clock, limit):
    await no_span_holds_more_than_the_limit(make(), clock, limit)


@pytest.mark.parametrize("limit", [1, 100, 128, 129, 2345])
async def test_no_span_holds_more_than_a_limit_of_any_size(make_local, clock, limit):
    await no_span_holds_more_than_the_limit(make_local(), clock, limit)


async def no_span_holds_more_than_the_limit(limiter, clock, limit):
    """Over any 60 seconds, whenever they begin: but for one request; and little is lost."""
    alice = key(rpm=limit)
    rng = random.Random(limit)
    times = []
    offered = 0
    end = clock.now + 240
    while clock.now < end:
        # Ten times too much, in bursts.
        for _ in range(rng.randrange(20)):
            offered += 1
            if await refusal(limiter, alice) is None:
                times.append(clock.now)
        clock.now += rng.random() * 2 * 60 / limit
    spans = [times[i + limit] - times[i] for i in range(len(times) - limit)]
    assert min(spans) >= 60 - (60 / limit if limit <= EXACT else 0) - 1e-5
    for minute in range(1, 5):
        assert sum(time < 1000 + minute * 60 for time in times) <= limit * minute
    assert len(times) >= limit * 4 * 0.99 - 1
    assert offered > len(times) * 4


@pytest.mark.parametrize("rate", [0.5, 2.5])
async def test_a_minute_admits_the_limit(make, clock, rate):
    await a_minute_admits_the_limit_under_ten_times_as_much(make(), clock, rate)


@pytest.mark.parametrize("rate", [1, 5, 10, 100])
async def test_a_minute_admits_a_limit_of_any_size(make_local, clock, rate):
    await a_minute_admits_the_limit_under_ten_times_as_much(make_local(), clock, rate)


async def a_minute_admits_the_limit_under_ten_times_as_much(limiter, clock, rate):
    alice = key(rps=rate)
    start, admitted = clock.now, 0
    while clock.now < start + 60:
        admitted += await refusal(limiter, alice) is None
        clock.now += 0.1 / rate
    assert abs(admitted - 60 * rate) <= max(1, 0.6 * rate)


async def test_what_was_not_used_comes_back_and_what_was_used_beyond_counts(make, clock):
    limiter, alice = make(), key(tpm=1000)
    grant = await limiter.admit_request(alice)
    await grant.reserve(0, 900, 0)
    assert grant.tokens.remaining == 100
    assert (await refusal(limiter, alice, tokens=200)).retry_after == pytest.approx(60)
    clock.now += 10
    grant.settle(100, 0)
    grant.settle(900, 0)  # once is all
    assert await refusal(limiter, alice, tokens=900) is None
    clock.now += 60
    grant = await limiter.admit_request(alice)
    await grant.reserve(0, 10, 0)
    grant.use(500, 0)
    assert (await refusal(limiter, alice, tokens=501)) is not None
    grant.use(400, 0)  # of what was said before
    grant.settle(1500, 0)
    assert (await refusal(limiter, alice, tokens=1)).retry_after == pytest.approx(60)


async def test_tokens_are_settled_where_they_were_reserved(make, clock):
    """An answer that takes minutes gives back what it reserved to the minute it came in."""
    limiter, alice = make(), key(tpm=1000)
    grant = await limiter.admit_request(alice)
    await grant.reserve(0, 600, 0)
    clock.now += 61
    assert await refusal(limiter, alice, tokens=1000) is None
    grant.settle(100, 0)
    assert (await refusal(limiter, alice, tokens=1)) is not None


@pytest.mark.parametrize(
    ("own", "model"),
    [
        ({"tpm": 10}, {}),
        ({"tpd": 10}, {}),
        ({"budget": 10}, {}),
        ({}, {"requests_per_minute": 1}),
        ({}, {"concurrency": 1}),
        ({}, {"tokens_per_minute": 10}),
        ({}, {"budget": "0.00001"}),
    ],
)
async def test_a_failed_reservation_gives_back_everything(make_local, own, model):
    budget = own.pop("budget", None)
    model = msgspec.convert(model, ModelLimitSettings)
    limiter = make_local(model=model)
    alice = key(rps=1000, rpm=1000, concurrency=2, budget=budget, **own)
    filling = await limiter.admit_request(alice)
    await filling.reserve(0, 9, 9)
    before = (await limiter.admit_request(alice)).requests.remaining
    # One is left running above; each of these would stay as the second, if it cost anything.
    for _ in range(20):
        other = key(2, rps=1000, rpm=1000, concurrency=1, budget=budget, **own)
        if own or budget:
            other = msgspec.structs.replace(other, index=1, id="key1")
        error = await refusal(limiter, msgspec.structs.replace(other, limits=alice.limits), tokens=2, money=2)
        assert error is not None
    assert limiter.usage(2).running == 0
    assert limiter.usage(1).running == 2
    assert limiter.usage(1).reserved == 9
    filling.settle(9, 9)
    assert limiter.usage(1).running == 1
    assert before == 998


async def test_a_request_refused_after_all_is_as_if_it_had_never_come(make):
    limiter = make(model=ModelLimitSettings(requests_per_minute=1, tokens_per_minute=10))
    alice = key(rps=1, rpm=1, tpm=10, tpd=10, concurrency=1, budget=10)
    for _ in range(5):
        grant = await limiter.admit_request(alice)
        await grant.reserve(0, 10, 10)
        grant.give_back()
        grant.settle(10, 10)
        await settled(limiter)
    assert await refusal(limiter, alice, tokens=10, money=10) is None
    assert (await usage(limiter)).spent == 10


async def test_so_many_at_the_same_time(make, clock):
    limiter, alice = make(), key(concurrency=2)
    first, _second = [await limiter.admit_request(alice) for _ in range(2)]
    with pytest.raises(OverLimit) as caught:
        await limiter.admit_request(alice)
    assert (caught.value.code, caught.value.retry_after) == ("concurrency_exceeded", 1.0)
    clock.now += 8
    first.settle(0, 0)
    await settled(limiter)
    third = await limiter.admit_request(alice)
    with pytest.raises(OverLimit) as caught:
        await limiter.admit_request(alice)
    assert caught.value.retry_after == 4.0  # eight seconds, at two places
    await third.reserve(1, 5, 5)
    third.settle(5, 5)
    assert (await usage(limiter)).running == 1


async def test_a_model_runs_so_many_for_all_keys(make):
    limiter = make(model=ModelLimitSettings(concurrency=1))
    grant = await limiter.admit_request(key(1))
    await grant.reserve(0, 1, 1)
    error = await refusal(limiter, key(2))
    assert (error.code, error.message.split()[2]) == ("model_concurrency_exceeded", "first")
    assert await refusal(limiter, key(2), model=1) is None
    grant.settle(1, 1)
    assert await refusal(limiter, key(2)) is None


async def test_a_budget_is_not_overdrawn_by_what_is_under_way(make):
    limiter, alice = make(), key(budget=1_000_000)
    grants = [await limiter.admit_request(alice) for _ in range(4)]
    for grant in grants:
        await grant.reserve(0, 10, 250_000)
    error = await refusal(limiter, alice, money=1)
    assert (error.status, error.code, error.retry_after) == (402, "insufficient_quota", None)
    grants[0].settle(5, 100_000)
    assert await refusal(limiter, alice, money=150_000) is None
    assert (await refusal(limiter, alice, money=1)).status == 402
    for grant in grants[1:]:
        grant.settle(10, 250_000)
    assert (await usage(limiter)).spent == 1_000_000
    assert (await usage(limiter)).reserved == 0


async def test_spending_counts_before_there_is_a_budget(make_local):
    limiter = make_local()
    assert await refusal(limiter, key(), tokens=7, money=900) is None
    assert (limiter.usage(1).spent, limiter.usage(1).tokens_today) == (900, 7)
    assert (await refusal(limiter, key(budget=1000), money=101)).status == 402


async def test_the_day_ends_at_midnight(make, clock):
    limiter, alice = make(), key(tpd=100)
    grant = await limiter.admit_request(alice)
    await grant.reserve(0, 60, 0)
    assert grant.tokens.reset == pytest.approx(43200)
    error = await refusal(limiter, alice, tokens=41)
    assert error.retry_after == pytest.approx(43200)
    clock.now += 43200
    assert await refusal(limiter, alice, tokens=50) is None
    grant.settle(90, 0)  # counts for the day it began on
    assert (await usage(limiter)).tokens_today == 50
    assert await refusal(limiter, alice, tokens=50) is None
    clock.now -= 43200  # a clock set back begins no day
    assert await refusal(limiter, alice, tokens=1) is not None


async def test_the_ledger_tells_what_was_before(make_local, clock):
    limiter = make_local(model=ModelLimitSettings(tokens_per_day=50))
    limiter.load(1, 900, int(clock.wall()) // 86400, 60)
    limiter.load(2, 0, int(clock.wall()) // 86400 - 1, 60)
    limiter.load_model(0, 0, int(clock.wall()) // 86400, 10)
    assert (await refusal(limiter, key(tpd=100), model=1, tokens=41)).code == "tokens_per_day_exceeded"
    assert (await refusal(limiter, key(budget=1000), model=1, money=101)).status == 402
    assert await refusal(limiter, key(2, tpd=100), model=1, tokens=100) is None
    assert (await refusal(limiter, key(3), tokens=41)).code == "model_tokens_per_day_exceeded"
    limiter.charge(1, 0, 40, 100)
    assert (limiter.usage(1).spent, limiter.usage(1).tokens_today) == (1000, 100)
    assert (await refusal(limiter, key(3), tokens=1)).code == "model_tokens_per_day_exceeded"


async def test_a_slot_begins_anew_with_its_next_key(make_local):
    limiter = make_local()
    old = await limiter.admit_request(key(concurrency=1, rpm=1, tpm=10, budget=10))
    await old.reserve(0, 10, 10)
    limiter.reset(1)
    new = msgspec.structs.replace(key(concurrency=1, rpm=1, tpm=10, budget=10), id="another")
    grant = await limiter.admit_request(new)
    await grant.reserve(0, 10, 10)
    old.use(20, 20)
    old.settle(20, 20)
    assert limiter.usage(1) == local_limits.Usage(1, 10, 0, limiter.usage(1).day, 0)
    grant.settle(10, 10)
    assert limiter.usage(1) == local_limits.Usage(0, 0, 10, limiter.usage(1).day, 10)


async def test_a_request_that_could_never_fit_says_so(make):
    limiter, alice = make(), key(tpm=100, tpd=200)
    error = await refusal(limiter, alice, tokens=101)
    assert (error.code, error.retry_after) == ("tokens_per_minute_exceeded", None)
    assert "101" in error.message


async def test_what_an_answer_is_taken_to_need(make):
    limiter = make(
        msgspec.structs.replace(NONE, reserved_completion_tokens=500),
        model=ModelLimitSettings(tokens_per_minute=1200),
    )
    assert limiter.estimate(key(), 1, 50, None) == 500
    assert limiter.estimate(key(), 1, 50, 20) == 20
    assert limiter.estimate(key(), 1, 50, 100_000) == 500
    assert limiter.estimate(key(), 0, 50, None) == 300
    modest = key(tpm=400, tpd=10_000)
    assert limiter.estimate(modest, 1, 50, None) == 100
    assert limiter.estimate(modest, 1, 390, None) == 10
    assert limiter.estimate(modest, 1, 4000, None) == 1


async def test_where_nothing_is_limited_nothing_is_reserved_and_all_is_counted(make):
    limiter = make(model=ModelLimitSettings(tokens_per_minute=1200))
    for limited in (key(slot=2, tpm=100), key(slot=2, tpd=100), key(slot=2, budget=100)):
        assert (await limiter.admit_request(limited)).reserves(1)
    assert (await limiter.admit_request(key(slot=2, concurrency=5))).reserves(1)
    grant = await limiter.admit_request(key())
    assert grant.reserves(0)
    assert not grant.reserves(1)
    grant.settle(30, 5)
    counted = await usage(limiter)
    assert (counted.reserved, counted.spent, counted.tokens_today) == (0, 5, 30)


async def test_headers_tell_the_tightest(make, clock):
    limiter = make(model=ModelLimitSettings(requests_per_minute=3, tokens_per_minute=50))
    alice = key(rps=100, rpm=5, tpm=100, tpd=1000)
    grant = await limiter.admit_request(alice)
    assert (grant.requests.limit, grant.requests.remaining, grant.tokens) == (5, 4, None)
    await grant.reserve(0, 30, 0)
    assert (grant.requests.limit, grant.requests.remaining) == (3, 2)
    assert (grant.tokens.limit, grant.tokens.remaining, grant.tokens.reset) == (50, 20, 60.0)
    clock.now += 20
    error = await refusal(limiter, alice, tokens=21)
    assert (error.tokens.remaining, error.tokens.reset) == (20, 40.0)


async def test_a_dead_worker_gives_everything_back(make_local):
    model = ModelLimitSettings(concurrency=4, tokens_per_minute=1000, budget=1)
    workers = [make_local(model=model, worker=worker) for worker in range(3)]
    alice = key(concurrency=4, tpm=1000, tpd=1000, budget=1000)
    grants = []
    for limiter in (workers[1], workers[1], workers[2]):
        grants.append(await limiter.admit_request(alice))
        await grants[-1].reserve(0, 300, 300)
    await workers[1].admit_request(alice)
    assert (await refusal(workers[0], alice)).code == "concurrency_exceeded"
    make_local().forget_worker(1)
    assert (workers[0].usage(1).running, workers[0].usage(1).reserved) == (1, 300)
    assert await refusal(workers[0], alice, tokens=700, money=700) is None
    grants[2].settle(300, 300)
    again = make_local(model=model, worker=1)
    grant = await again.admit_request(alice)
    assert (await refusal(workers[0], alice)) is None
    grant.settle(0, 0)
    assert workers[0].usage(1).running == 0


async def test_the_tokens_a_dead_worker_had_used_stay_counted(make_local):
    limiter, alice = make_local(), key(tpm=1000)
    grant = await limiter.admit_request(alice)
    await grant.reserve(0, 100, 0)
    grant.use(700, 0)
    limiter.forget_worker(0)
    assert (await refusal(limiter, alice, tokens=301)) is not None
    assert (await refusal(limiter, alice, tokens=300)) is None


async def test_a_full_table_refuses_and_recovers(make_local, monkeypatch):
    monkeypatch.setattr(local_limits, "ROWS", 2)
    limiter, alice = make_local(), key(concurrency=10, rpm=10)
    grants = [await limiter.admit_request(alice) for _ in range(2)]
    with pytest.raises(EngineUnavailable):
        await limiter.admit_request(alice)
    bob = key(2, rpm=10, tpm=100)
    grant = await limiter.admit_request(bob)
    with pytest.raises(EngineUnavailable):
        await grant.reserve(0, 1, 0)
    grants[0].settle(0, 0)
    assert (await limiter.admit_request(bob)).requests.remaining == 9
    assert await refusal(limiter, bob, tokens=1) is None


async def test_random_traffic_adds_up(make_local, clock):
    """Whatever happens in whatever order, in the end nothing is running or reserved, and all is spent."""
    rng = random.Random(11)
    model = ModelLimitSettings(concurrency=8, requests_per_minute=300, tokens_per_minute=5000)
    workers = [make_local(model=model, worker=worker) for worker in range(3)]
    keys = [key(slot, concurrency=5, rpm=200, tpm=3000, tpd=10**9, budget=10**9) for slot in range(3)]
    held: list[list] = [[], [], []]
    spent = [0, 0, 0]
    for _ in range(4000):
        clock.now += rng.random() / 5
        worker, slot = rng.randrange(3), rng.randrange(3)
        action = rng.random()
        if action < 0.5:
            try:
                grant = await workers[worker].admit_request(keys[slot])
                if rng.random() < 0.9:
                    await grant.reserve(rng.randrange(2), rng.randrange(200), rng.randrange(200))
            except OverLimit:
                continue
            held[worker].append((slot, grant))
        elif action < 0.95 and held[worker]:
            slot, grant = held[worker].pop(rng.randrange(len(held[worker])))
            used = rng.randrange(300)
            if rng.random() < 0.3:
                grant.give_back()
            else:
                grant.use(used // 2, used // 2)
                grant.settle(used, used)
                spent[slot] += used
        elif action < 0.952:
            workers[0].forget_worker(worker)
            workers[worker] = make_local(model=model, worker=worker)
            held[worker] = []
        for slot in range(3):
            running = sum(1 for grants in held for owner, _ in grants if owner == slot)
            assert workers[0].usage(slot).running == running
    for worker in range(3):
        for slot, grant in held[worker]:
            grant.settle(1, 1)
            spent[slot] += 1
    for slot in range(3):
        usage = workers[0].usage(slot)
        assert (usage.running, usage.reserved, usage.spent) == (0, 0, spent[slot])
    clock.now += 61
    for slot in range(3):
        assert await refusal(workers[0], keys[slot], model=1, tokens=3000) is None


def run(coroutine):
    """The result of a coroutine that never waits: limits of one machine are there at once."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waited")


def _hammer(fd: int, seconds: float, worker: int, admitted) -> None:
    memory = SharedMemory(fd, LocalLimiter.cells_for(0, 4))
    limiter = LocalLimiter(memory, 0, LimitSettings(requests_per_second=200), [], workers=4, worker=worker)
    alice = key()
    end = time.monotonic() + seconds
    count = 0
    while time.monotonic() < end:
        try:
            run(limiter.admit_request(alice))
            count += 1
        except RateLimited:
            pass
    admitted.put(count)


def test_many_processes_share_one_rate():
    memory = SharedMemory.create(LocalLimiter.cells_for(0, 4))
    fork = multiprocessing.get_context("fork")
    admitted = fork.Queue()
    processes = [fork.Process(target=_hammer, args=(memory.fd, 1.9, n, admitted)) for n in range(4)]
    began = time.monotonic()
    for process in processes:
        process.start()
    total = sum(admitted.get() for _ in processes)
    for process in processes:
        process.join()
    assert 400 <= total <= 200 * int(time.monotonic() - began + 1)
    memory.close()


def _churn(fd: int, worker: int) -> None:
    memory = SharedMemory(fd, LocalLimiter.cells_for(1, 2))
    models = [ModelSettings(name="m", limits=ModelLimitSettings(concurrency=100, tokens_per_minute=10**9))]
    limiter = LocalLimiter(memory, 0, NONE, models, workers=2, worker=worker)
    alice = key(concurrency=100, tpm=10**9, tpd=10**9, budget=10**9)
    while True:
        grant = run(limiter.admit_request(alice))
        run(grant.reserve(0, 10, 10))
        grant.use(20, 20)
        grant.settle(0, 0)


def test_workers_killed_at_any_instruction_leave_nothing_behind():
    memory = SharedMemory.create(LocalLimiter.cells_for(1, 2))
    models = [ModelSettings(name="m", limits=ModelLimitSettings(concurrency=100, tokens_per_minute=10**9))]
    supervisor = LocalLimiter(memory, 0, NONE, models, workers=2)
    fork = multiprocessing.get_context("fork")
    rng = random.Random(5)
    for _ in range(60):
        process = fork.Process(target=_churn, args=(memory.fd, 1))
        process.start()
        time.sleep(0.004 + rng.random() * 0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        supervisor.forget_worker(1)
        usage = supervisor.usage(1)
        assert (usage.running, usage.reserved) == (0, 0)
    base = local_limits.ACCOUNT * 65536
    assert list(memory.ints[base : base + 2]) == [0, 0]
    memory.close()
