"""Each policy keeps its promise, and none chooses a replica that may not be chosen."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.gateway.prefix import PrefixIndex
from deepseek_api_compat.gateway.routing import BOUND, POLICIES, SCAN, Candidate, Prompt, policy

BLOCK = 4


def prompt(*parts, session=b""):
    """One block for each part, and one token more."""
    ids = [part * BLOCK + offset for part in parts for offset in range(BLOCK)]
    return Prompt.of([*ids, 0], BLOCK, session=session)


@pytest.fixture
def index():
    return PrefixIndex(BLOCK)


def fleet(count, **fields):
    return [Candidate(replica, **fields) for replica in range(count)]


def serve(chosen, prompts, replicas):
    """Send all, none of which ends; how many each replica got."""
    counts = Counter()
    for one in prompts:
        first = chosen.order(one, replicas)[0]
        replicas[first].running += 1
        counts[first] += 1
    return [counts[replica] for replica in range(len(replicas))]


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("count", [1, 5, 3 * SCAN])
def test_none_that_may_not_be_chosen_is(name, count, index):
    chosen = policy(name, index)
    asked = prompt(1, 2)
    for replica in range(count):
        index.insert(replica, asked.hashes)
    replicas = fleet(count, healthy=False)
    assert chosen.order(asked, replicas) == []
    full = fleet(count, slots=2, running=1, queued=1)
    assert chosen.order(asked, full) == []
    for replica in replicas[: count // 2 + 1]:
        replica.healthy = True
    for _ in range(20):
        order = chosen.order(asked, replicas)
        assert len(set(order)) == len(order)
        assert set(order) <= set(range(count // 2 + 1))


@pytest.mark.parametrize("name", POLICIES)
def test_all_that_may_be_chosen_are_named(name, index):
    assert sorted(policy(name, index).order(prompt(1), fleet(SCAN))) == list(range(SCAN))


@pytest.mark.parametrize("name", ["round-robin", "least-load", "prefix"])
def test_different_prompts_spread_evenly(name, index):
    prompts = [prompt(number, number + 1) for number in range(60)]
    assert serve(policy(name, index), prompts, fleet(6)) == [10] * 6


@pytest.mark.parametrize("name", ["round-robin", "least-load", "prefix"])
def test_weights_are_shares(name, index):
    replicas = fleet(3)
    replicas[1].weight, replicas[2].weight = 2.0, 0.5
    prompts = [prompt(number) for number in range(70)]
    counts = serve(policy(name, index), prompts, replicas)
    assert [abs(count - due) <= 2 for count, due in zip(counts, (20, 40, 10), strict=True)] == [True] * 3


@pytest.mark.parametrize("name", ["round-robin", "least-load", "prefix"])
def test_a_new_replica_gets_little_at_first(name, index):
    chosen = policy(name, index, slow_start=30.0)
    for age, least, most in ((0.0, 2, 9), (15.0, 20, 30), (30.0, 33, 37)):
        replicas = fleet(3)
        replicas[2].age = age
        counts = serve(chosen, [prompt(number) for number in range(105)], replicas)
        assert least <= counts[2] <= most, age


def test_a_new_replicas_slots_open_one_after_another(index):
    chosen = policy("least-load", index, slow_start=10.0)
    replicas = fleet(1, slots=8)
    for age, room in ((0.0, 1), (2.6, 3), (5.0, 4), (10.0, 8)):
        replicas[0].age, replicas[0].running = age, room - 1
        assert chosen.order(prompt(1), replicas) == [0]
        replicas[0].running = room
        assert chosen.order(prompt(1), replicas) == []


def test_who_was_away_makes_up_for_nothing_in_turns(index):
    chosen = policy("round-robin", index)
    replicas = fleet(2)
    replicas[1].healthy = False
    serve(chosen, [prompt(1)] * 50, replicas)
    replicas[1].healthy = True
    assert max(serve(chosen, [prompt(1)] * 10, replicas)) <= 6


def test_turns_go_around_a_large_fleet(index):
    chosen = policy("round-robin", index)
    assert serve(chosen, [prompt(1)] * 400, fleet(200)) == [2] * 200


def test_the_cheapest_replica_holds_the_prefix(index):
    asked = prompt(1, 2, 3, 4, 5)
    index.insert(1, asked.hashes[:4])
    index.insert(2, asked.hashes[:2])
    assert policy("prefix", index).order(asked, fleet(3)) == [1, 2, 0]


def test_a_busy_holder_gives_way_when_computing_anew_is_cheaper(index):
    """21 tokens, of which 16 are held: 5 x batch beside 21 x 1."""
    asked = prompt(1, 2, 3, 4, 5)
    index.insert(0, asked.hashes[:4])
    replicas = fleet(2)
    chosen = policy("prefix", index)
    replicas[0].running = 3
    assert chosen.order(asked, replicas) == [0, 1]
    replicas[0].queued = 1
    assert chosen.order(asked, replicas) == [1, 0]


def test_prompts_not_computed_yet_count(index):
    replicas = fleet(2)
    replicas[0].pending = 100
    assert [policy("prefix", index).order(prompt(1), replicas)[0] for _ in range(4)] == [1] * 4


def test_a_prompt_that_is_held_as_a_whole_still_goes_where_less_runs(index):
    asked = Prompt(2 * BLOCK, prompt(1, 2).hashes, 0)
    index.insert(0, asked.hashes)
    index.insert(1, asked.hashes)
    replicas = fleet(2)
    replicas[0].running = 1
    assert policy("prefix", index).order(asked, replicas) == [1, 0]


def test_the_one_holder_in_a_large_fleet_is_found(index):
    asked = prompt(1, 2, 3)
    index.insert(777, asked.hashes)
    index.insert(5000, asked.hashes)  # of another time, when there were more
    assert policy("prefix", index).order(asked, fleet(1000))[0] == 777


def test_a_session_stays_where_it_is(index):
    chosen = policy("consistent-hash", index)
    replicas = fleet(8)
    homes = {chosen.order(prompt(n, session=b"alice"), replicas)[0] for n in range(10)}
    assert len(homes) == 1
    home = homes.pop()
    replicas[home].healthy = False
    other = chosen.order(prompt(1, session=b"alice"), replicas)[0]
    assert other != home
    replicas[home].healthy = True
    assert chosen.order(prompt(1, session=b"alice"), replicas)[0] == home


def test_few_sessions_move_when_a_replica_is_added(index):
    before, after = policy("consistent-hash", index), policy("consistent-hash", index)
    sessions = [prompt(1, session=b"%d" % number) for number in range(300)]
    moved = sum(before.order(one, fleet(8))[0] != after.order(one, fleet(9))[0] for one in sessions)
    assert 0 < moved <= 300 / 9 * 2


def test_one_busy_session_overflows_its_replica(index):
    counts = serve(policy("consistent-hash", index), [prompt(1, session=b"bob")] * 80, fleet(8))
    assert max(counts) <= BOUND * 10 + 1
    assert sum(counts) == 80


def test_all_start_with_the_same_ring(index):
    orders = [policy("consistent-hash", index, seed=seed).order(prompt(7), fleet(8)) for seed in (0, 1)]
    assert orders[0] == orders[1]


def test_a_short_prompt_has_an_affinity_too():
    assert Prompt.of([1], BLOCK).affinity != Prompt.of([2], BLOCK).affinity
    assert Prompt.of([1], BLOCK, session=b"s").affinity == Prompt.of([2], BLOCK, session=b"s").affinity


CANDIDATES = st.lists(
    st.builds(
        Candidate,
        replica=st.just(0),
        running=st.integers(0, 9),
        queued=st.integers(0, 9),
        slots=st.integers(0, 9),
        pending=st.integers(0, 1000),
        weight=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        age=st.sampled_from([0.0, 7.0, 1e9]),
        healthy=st.booleans(),
    ),
    max_size=9,
)


@given(st.sampled_from(sorted(POLICIES)), CANDIDATES, st.lists(st.integers(0, 3), max_size=4))
def test_whatever_the_replicas_are_only_those_that_may_are_named(name, candidates, parts):
    for number, candidate in enumerate(candidates):
        candidate.replica = number
    able = {
        one.replica
        for one in candidates
        if one.healthy
        and one.weight
        and (not one.slots or one.running + one.queued < one.slots * max(0.1, min(1.0, one.age / 30)))
    }
    chosen = policy(name, PrefixIndex(BLOCK))
    for _ in range(3):
        order = chosen.order(prompt(*parts), candidates)
        assert sorted(order) == sorted(able)
