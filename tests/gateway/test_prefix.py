"""The prefix index agrees with a naive one, stays small whatever is sent, and believes the engine."""

import subprocess
import sys
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.engines.kv_events import BlocksRemoved, BlocksStored, Cleared
from deepseek_api_compat.gateway import prefix
from deepseek_api_compat.gateway.prefix import BlockCache, PrefixIndex, chain

BLOCK = 4


def ids(*parts):
    """One block for each part."""
    return [part * BLOCK + offset for part in parts for offset in range(BLOCK)]


def hashes(*parts, salt=b""):
    return chain(ids(*parts), BLOCK, salt)


@pytest.fixture
def index():
    return PrefixIndex(BLOCK, 10 * BLOCK)


def test_a_chain_has_a_hash_for_each_whole_block():
    assert chain([1, 2, 3], BLOCK) == []
    assert len(chain(list(range(4 * BLOCK + 3)), BLOCK)) == 4
    assert chain(list(range(9)), BLOCK) == chain(list(range(8)), BLOCK)


def test_a_hash_stands_for_all_before_it():
    assert hashes(1, 2, 3)[:2] == hashes(1, 2, 4)[:2]
    assert hashes(1, 2)[1] != hashes(3, 2)[1]


def test_one_tenants_prefix_is_not_anothers():
    assert not set(hashes(1, 2, salt=b"a")) & set(hashes(1, 2, salt=b"b"))


def test_hashes_are_the_same_in_another_process():
    script = f"from deepseek_api_compat.gateway.prefix import chain; print(chain({ids(1, 2)}, {BLOCK}))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == str(hashes(1, 2))


def test_the_longest_prefix_of_each_replica(index):
    index.insert(0, hashes(1, 2, 3))
    index.insert(1, hashes(1, 5))
    assert index.longest(hashes(1, 2, 7)) == {0: 2 * BLOCK, 1: BLOCK}
    assert index.longest(hashes(2, 3)) == {}
    assert index.held(7, hashes(1)) == 0


def test_who_holds_most_comes_first(index):
    index.insert(3, hashes(1))
    index.insert(5, hashes(1, 2, 3))
    index.insert(4, hashes(1, 2))
    assert index.best(hashes(1, 2, 3, 4), 8) == [5, 4, 3]
    assert index.best(hashes(1, 2, 3, 4), 2) == [5, 4]
    assert index.best(hashes(9), 8) == []


def test_all_that_hold_the_same_have_their_turn(index):
    for replica in range(20):
        index.insert(replica, hashes(1))
    turns = [index.best(hashes(1), 4, turn) for turn in range(20)]
    assert {len(set(best)) for best in turns} == {4}
    assert {replica for best in turns for replica in best} == set(range(20))


def test_the_least_recently_used_prefix_goes_first_and_from_its_end(index):
    index.insert(0, hashes(1, 2, 3, 4))
    index.insert(0, hashes(5, 6, 7, 8))
    index.insert(0, hashes(1, 2, 3, 4))
    index.insert(0, hashes(10, 11, 12))
    assert index.held(0, hashes(5, 6, 7, 8)) == 3 * BLOCK
    assert index.held(0, hashes(1, 2, 3, 4)) == 4 * BLOCK


def test_of_a_prompt_larger_than_the_cache_the_beginning_stays(index):
    index.insert(0, hashes(*range(25)))
    assert index.held(0, hashes(*range(25))) == 10 * BLOCK


def test_a_smaller_cache_than_expected(index):
    index.resize(0, 2 * BLOCK)
    index.insert(0, hashes(1, 2, 3))
    index.insert(1, hashes(1, 2, 3))
    assert index.longest(hashes(1, 2, 3)) == {0: 2 * BLOCK, 1: 3 * BLOCK}
    index.forget(0)
    index.insert(0, hashes(1, 2, 3))
    assert index.held(0, hashes(1, 2, 3)) == 2 * BLOCK


def test_the_engine_had_less_than_believed(index):
    index.insert(0, hashes(1, 2, 3))
    index.correct(0, hashes(1, 2, 3), BLOCK + 1)
    assert index.held(0, hashes(1, 2, 3)) == BLOCK
    assert index.best(hashes(1, 2, 3), 4) == [0]


def test_the_engine_had_more_than_believed(index):
    index.correct(0, hashes(1, 2, 3), 2 * BLOCK)
    assert index.held(0, hashes(1, 2, 3)) == 2 * BLOCK


def test_a_restarted_replica_holds_nothing(index):
    index.insert(0, hashes(1, 2))
    index.insert(1, hashes(1))
    index.forget(0)
    assert index.longest(hashes(1, 2)) == {1: BLOCK}
    assert index.best(hashes(1, 2), 4) == [1]
    index.forget(1)
    assert len(index) == 0


def stored(names, parent, parts, size=BLOCK, salt=b""):
    return BlocksStored(names, parent, ids(*parts), size, salt)


def test_what_the_engine_tells_counts_and_estimates_do_not(index):
    index.insert(0, hashes(7, 8))
    index.apply(0, stored([b"a", b"b"], None, (1, 2)))
    index.insert(0, hashes(9))
    assert index.longest(hashes(7, 8)) == index.longest(hashes(9)) == {}
    assert index.held(0, hashes(1, 2)) == 2 * BLOCK
    index.correct(0, hashes(1, 2), 0)
    assert index.held(0, hashes(1, 2)) == 2 * BLOCK


def test_told_blocks_go_on_behind_their_parent(index):
    index.apply(0, stored([1], None, (1,)))
    index.apply(0, stored([2, 3], 1, (2, 3)))
    index.apply(0, stored([4], 2, (4,)))
    assert index.held(0, hashes(1, 2, 3)) == 3 * BLOCK
    assert index.held(0, hashes(1, 2, 4)) == 3 * BLOCK
    index.apply(0, BlocksRemoved([3, 99]))
    assert index.held(0, hashes(1, 2, 3)) == 2 * BLOCK
    assert index.held(0, hashes(1, 2, 4)) == 3 * BLOCK
    index.apply(0, Cleared())
    assert index.longest(hashes(1, 2, 4)) == {}
    assert len(index) == 0


def test_told_blocks_are_not_bounded_by_what_was_estimated(index):
    parts = range(30)
    index.apply(0, stored(list(parts), None, parts))
    assert index.held(0, hashes(*parts)) == 30 * BLOCK


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_the_engines_blocks_may_have_another_size(index, size):
    tokens = ids(1, 2, 3, 4, 5, 6)
    names = list(range(len(tokens) // size))
    for name in names:
        parent = name - 1 if name else None
        index.apply(0, BlocksStored([name], parent, tokens[name * size : (name + 1) * size], size))
    assert index.held(0, chain(tokens, BLOCK)) == 6 * BLOCK
    index.apply(0, BlocksRemoved(names[-1:]))
    assert index.held(0, chain(tokens, BLOCK)) == (len(tokens) - size) // BLOCK * BLOCK


def test_told_blocks_have_a_salt_too(index):
    index.apply(0, stored([1], None, (1,), salt=b"tenant"))
    assert index.longest(hashes(1)) == {}
    assert index.longest(hashes(1, salt=b"tenant")) == {0: BLOCK}


def test_blocks_behind_an_unknown_parent_are_ignored(index):
    index.apply(0, stored([2], 1, (2,)))
    assert len(index) == 0


def test_what_an_engine_that_tells_is_computing_counts_until_it_is_computed(index):
    index.apply(0, stored([1], None, (1,)))
    for prompt in (hashes(1, 2, 3), hashes(1, 2, 4)):
        index.expect(0, prompt)
    assert index.held(0, hashes(1, 2, 3)) == 3 * BLOCK
    assert index.best(hashes(1, 2, 9), 1) == [0]
    index.settle(0, hashes(1, 2, 3))
    assert index.held(0, hashes(1, 2, 3)) == 2 * BLOCK
    index.apply(0, stored([2], 1, (2,)))
    index.settle(0, hashes(1, 2, 4))
    assert index.held(0, hashes(1, 2, 4)) == 2 * BLOCK
    index.apply(0, BlocksRemoved([2]))
    index.apply(0, BlocksRemoved([1]))
    assert len(index) == 0


def test_what_is_being_computed_outlives_the_engines_word_on_the_rest(index):
    index.apply(0, stored([1], None, (1,)))
    index.expect(0, hashes(1, 2))
    index.apply(0, BlocksRemoved([1]))
    assert index.held(0, hashes(1, 2)) == 2 * BLOCK
    index.apply(0, Cleared())
    assert index.held(0, hashes(1, 2)) == 2 * BLOCK
    assert index.best(hashes(1, 2), 1) == [0]
    index.settle(0, hashes(1, 2))
    index.settle(0, hashes(1, 2))
    assert len(index) == 0
    index.expect(0, hashes(5))
    index.forget(0)
    assert len(index) == 0


def test_what_is_expected_of_an_engine_that_does_not_tell_is_an_estimate(index):
    index.expect(0, hashes(1, 2))
    index.settle(0, hashes(1, 2))
    assert index.held(0, hashes(1, 2)) == 2 * BLOCK


def test_an_engine_that_tells_without_end_fills_no_memory(index, monkeypatch):
    monkeypatch.setattr(prefix, "MOST_TOLD", 100)
    for name in range(1000):
        index.apply(0, stored([name], None, (name,)))
    assert len(index) == 100
    assert index.held(0, hashes(999)) == BLOCK


def test_a_flood_of_unique_prompts_fills_no_memory(index):
    for number in range(2000):
        index.insert(number % 4, hashes(number, number + 1, number + 2))
    assert len(index) <= 4 * 10


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=5).map(lambda parts: hashes(*parts))
REPLICAS = st.integers(0, 2)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("insert"), REPLICAS, PROMPTS, st.just(0)),
        st.tuples(st.just("correct"), REPLICAS, PROMPTS, st.integers(-1, 6 * BLOCK)),
        st.tuples(st.just("forget"), REPLICAS, PROMPTS, st.just(0)),
    ),
    max_size=40,
)
MOST = 6


class Naive:
    """What each replica holds: a list, the most recently used block last."""

    def __init__(self):
        self.lists = {0: [], 1: [], 2: []}

    def insert(self, replica, blocks):
        held = self.lists[replica]
        for block in reversed(blocks[:MOST]):
            if block in held:
                held.remove(block)
            held.append(block)
        del held[: max(0, len(held) - MOST)]

    def correct(self, replica, blocks, tokens):
        count = max(0, tokens) // BLOCK
        self.insert(replica, blocks[:count])
        rest = blocks[count:]
        self.lists[replica] = [block for block in self.lists[replica] if block not in rest]

    def forget(self, replica):
        self.lists[replica] = []

    def held(self, replica, blocks):
        count = next((n for n, block in enumerate(blocks) if block not in self.lists[replica]), len(blocks))
        return count * BLOCK


@given(STEPS, PROMPTS)
def test_the_index_agrees_with_a_naive_one(steps, question):
    index, naive = PrefixIndex(BLOCK, MOST * BLOCK), Naive()
    for name, replica, blocks, tokens in steps:
        extra = (blocks, tokens) if name == "correct" else (blocks,) if name == "insert" else ()
        getattr(index, name)(replica, *extra)
        getattr(naive, name)(replica, *extra)
    held = {replica: naive.held(replica, question) for replica in naive.lists}
    assert index.longest(question) == {replica: tokens for replica, tokens in held.items() if tokens}
    assert len(index) == len({block for blocks in naive.lists.values() for block in blocks})
    best = index.best(question, 3)
    assert len(set(best)) == len(best)
    assert {replica for replica, tokens in held.items() if tokens} <= set(best)


@given(st.lists(PROMPTS, max_size=30))
def test_no_block_outlives_the_one_before_it(prompts):
    """As long as nothing is corrected: so what is counted as held is all that is there."""
    cache = BlockCache(MOST)
    before = {}
    for blocks in prompts:
        before.update(zip(blocks[1:], blocks[:-1], strict=True))
        cache.use(blocks)
        assert all(before[block] in set(cache) for block in cache if block in before)
        assert len(cache) <= MOST


@given(st.lists(st.integers(0, 2), max_size=6), st.integers(1, 6))
def test_told_and_estimated_agree(parts, size):
    tokens = ids(*parts)
    index = PrefixIndex(BLOCK)
    count = len(tokens) // size
    names = [tuple(tokens[: (n + 1) * size]).__hash__() for n in range(count)]
    parent = None
    names_left = iter(names)
    while batch := list(islice(names_left, 2)):
        start = names.index(batch[0]) * size
        index.apply(0, BlocksStored(batch, parent, tokens[start : start + len(batch) * size], size))
        parent = batch[-1]
    assert index.held(0, chain(tokens, BLOCK)) == count * size // BLOCK * BLOCK
