"""The simulated replicas obey arithmetic, and on them the policies are worth what docs/routing.md says."""

import json
import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path

import bench.routing.simulation
import pytest
from bench.routing.__main__ import hit_rate, quantile, simulate, spread
from bench.routing.simulation import Fault, Machine, Simulation
from bench.routing.trace import BLOCK, Mix, Request, made_up, read

from deepseek_api_compat.gateway.prefix import PrefixIndex
from deepseek_api_compat.gateway.routing import POLICIES, Prompt, policy

ROOT = Path(__file__).resolve().parents[2]
REPLICAS = 8
# A step takes a second, and another one if it computes 1,024 prompt tokens, the most it can.
SLOW = Machine(slots=2, prefill=1024.0, step=1.0, batch_step=0.0, chunk=1024)


def simulation(requests, count=1, machine=SLOW, name="prefix", **options):
    index = PrefixIndex(BLOCK, machine.cache)
    return Simulation(requests, count, policy(name, index, slow_start=1.0), index, machine=machine, **options)


def request(at, *blocks, output=1):
    return Request(at, Prompt(len(blocks) * BLOCK, blocks, hash(blocks[:1]) % (1 << 64)), output)


def test_a_prompt_takes_its_steps():
    """2,048 tokens: two steps of two seconds."""
    outcome = simulation([request(0.0, 1, 2, 3, 4)]).run()
    assert outcome.first_token == [pytest.approx(4.0)]
    assert outcome.seconds == pytest.approx(4.0)


def test_an_answer_takes_a_step_for_each_token_after_the_first():
    outcome = simulation([request(0.0, 1, 2, output=11)]).run()
    assert outcome.seconds == pytest.approx(2.0 + 10.0)
    assert outcome.busy == [pytest.approx(12.0)]


def test_what_is_cached_is_not_computed_again_but_for_the_last_token():
    outcome = simulation([request(0.0, 1, 2), request(100.0, 1, 2)]).run()
    assert outcome.first_token == [pytest.approx(2.0), pytest.approx(2.0 / 1024)]
    assert (outcome.prompt_tokens, outcome.cached_tokens) == (2048, 1023)


def test_a_cache_that_is_too_small_forgets():
    machine = Machine(slots=2, prefill=1024.0, step=1.0, batch_step=0.0, chunk=1024, cache=2 * BLOCK)
    outcome = simulation(
        [request(0.0, 1, 2), request(50.0, 3, 4), request(100.0, 1, 2)], machine=machine
    ).run()
    assert outcome.cached_tokens == 0


def test_a_full_replica_makes_others_wait():
    requests = [request(0.0, number, output=101) for number in range(3)]
    outcome = simulation(requests).run()
    first = outcome.first_token
    assert first[1] < 10.0
    assert first[2] > 100.0
    assert outcome.ended == 3


def test_who_waits_goes_home():
    """Two full replicas, of which the one with block 1 is free first; the older of two that wait is new."""
    outputs = {1: 200, 2: 220, 3: 400, 4: 400}
    running = [request(0.0, block, output=output) for block, output in outputs.items()]
    waiting = [request(20.0, 9, output=100), request(21.0, 1)]
    at_home = simulation([*running, *waiting], 2).run()
    in_order = simulation([*running, *waiting], 2, home=False).run()
    assert (at_home.cached_tokens, in_order.cached_tokens) == (BLOCK - 1, 0)
    assert at_home.ended == in_order.ended == 6


def test_who_was_passed_over_too_often_is_next(monkeypatch):
    monkeypatch.setattr(bench.routing.simulation, "PASSED_OVER", 2)
    running = [request(0.0, 1, output=30), request(0.0, 2, output=10_000)]
    waiting = [request(1.0, 9, output=30), *(request(25.0, 1, output=30) for _ in range(5))]
    first = simulation([*running, *waiting]).run().first_token
    assert len(first) == 8
    # Half a minute each, one after another: the older one is the third, and waits since the first second.
    assert first[2:] == [pytest.approx(due, abs=8.0) for due in (6.0, 35.0, 89.0, 94.0, 123.0, 152.0)]


@pytest.mark.parametrize("name", POLICIES)
def test_a_dead_replica_gets_nothing_and_what_it_had_is_done_elsewhere(name):
    requests = [request(0.1 * number, number % 20, output=3) for number in range(200)]
    fault = Fault(0, 5.0, 1e6)
    machine = Machine(slots=4, prefill=1e5)
    dead = simulation(requests, 3, machine, name, faults=[fault])
    outcome = dead.run()
    before = simulation([one for one in requests if one.at < 5.0], 3, machine, name).run()
    assert outcome.ended == 200
    assert outcome.sent[0] == before.sent[0] > 0
    assert len(outcome.first_token) == 200


def test_work_under_way_at_a_death_is_sent_again():
    outcome = simulation([request(0.0, 1, output=50)], 2, faults=[Fault(0, 10.0, 20.0)]).run()
    assert (outcome.resent, outcome.ended, outcome.sent) == (1, 1, [1, 1])
    assert outcome.first_token == [pytest.approx(1.0)]


@cache
def outcomes():
    """A small version of docs/routing.md's table."""
    requests = made_up(Mix(rate=2.0 * REPLICAS / Mix.turns), 3000, seed=7)
    return {name: simulate(name, requests, REPLICAS, Machine()) for name in POLICIES}


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("other", sorted(set(POLICIES) - {"prefix"}))
def test_by_prefix_more_is_cached_and_answers_begin_sooner(other):
    best, others = outcomes()["prefix"], outcomes()[other]
    assert hit_rate(best) > hit_rate(others)
    assert mean(best.first_token) < mean(others.first_token)
    assert quantile(best.first_token, 0.99) < quantile(others.first_token, 0.99)


@pytest.mark.parametrize("name", POLICIES)
def test_load_is_spread_and_no_replica_starves(name):
    outcome = outcomes()[name]
    uneven, _ = spread(outcome.busy)
    assert uneven < 1.5
    assert min(outcome.sent) > 0.5 * mean(outcome.sent)
    assert outcome.ended == 3000


def test_the_same_options_give_the_same_figures():
    command = [sys.executable, "-m", "bench.routing", "--requests", "300", "--replicas", "70"]
    runs = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(2)]
    tables = [[line.rsplit("|", 2)[0] for line in run.stdout.splitlines()] for run in runs]
    assert tables[0] == tables[1]
    assert len(tables[0]) == 4 + len(POLICIES)


def test_conversations_grow_and_share_system_prompts():
    requests = made_up(Mix(rate=1.0, systems=3), 300, seed=1)
    assert [one.at for one in requests] == sorted(one.at for one in requests)
    assert len({one.prompt.hashes[0] for one in requests}) == 3
    turns = {}
    for one in requests:
        turns.setdefault(one.prompt.affinity, []).append(one.prompt)
    assert max(len(prompts) for prompts in turns.values()) > 3
    for prompts in turns.values():
        for earlier, later in pairwise(prompts):
            assert later.hashes[: len(earlier.hashes)] == earlier.hashes
            assert later.tokens > earlier.tokens
        assert all(len(prompt.hashes) == prompt.tokens // BLOCK for prompt in prompts)


def test_a_trace_in_mooncakes_format(tmp_path):
    rows = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 52, "hash_ids": [46, 47, 2353]},
        {"timestamp": 0, "input_length": 512, "output_length": 0, "hash_ids": [46]},
    ]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = read(trace, speed=2.0)
    assert (first.at, first.output) == (0.0, 1)
    assert (second.at, second.output) == (1.5, 52)
    assert second.prompt[:2] == (1100, [46, 47])
    assert simulation([first, second]).run().cached_tokens == 512


@pytest.mark.parametrize("line", ["{}", "[1]", "no", '{"timestamp": 1, "input_length": "x"}'])
def test_a_line_that_is_no_request_is_named(tmp_path, line):
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n" + line + "\n")
    with pytest.raises(ValueError, match="Line 2"):
        read(trace)
