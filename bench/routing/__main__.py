"""What each routing policy does to hit rate, time to the first token and load, on simulated replicas.

    python -m bench.routing [--replicas 8] [--requests 20000] [--seed 0]
    python -m bench.routing --trace conversation_trace.jsonl [--speed 2] [--replicas 16]

Without a trace, conversations are made up, so many that each replica is asked `--load` requests a second.
The same options give the same figures. bench/routing/simulation.py says what a replica is, docs/routing.md
what came out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, pstdev

from bench.routing.simulation import Machine, Outcome, Simulation
from bench.routing.trace import BLOCK, Mix, Request, made_up, read
from deepseek_api_compat.gateway.prefix import PrefixIndex
from deepseek_api_compat.gateway.routing import POLICIES, policy

HEADINGS = (
    "policy",
    "hit rate",
    "TTFT mean",
    "p50",
    "p99",
    "load max/mean",
    "load CV",
    "simulated in",
)


def hit_rate(outcome: Outcome) -> float:
    """The share of all prompt tokens that replicas had in their caches."""
    return outcome.cached_tokens / max(1, outcome.prompt_tokens)


def quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def spread(loads: Sequence[float]) -> tuple[float, float]:
    """How uneven loads are: the largest over the mean, and the coefficient of variation."""
    mean = fmean(loads)
    return max(loads) / mean, pstdev(loads) / mean


def simulate(
    name: str,
    requests: Sequence[Request],
    replicas: int,
    machine: Machine,
    *,
    seed: int = 0,
    home: bool = True,
) -> Outcome:
    index = PrefixIndex(BLOCK, machine.cache)
    chosen = policy(name, index, seed=seed)
    return Simulation(requests, replicas, chosen, index, machine=machine, home=home).run()


def row(name: str, outcome: Outcome, seconds: float) -> str:
    uneven, varied = spread(outcome.busy)
    first = outcome.first_token
    cells = (
        name,
        f"{hit_rate(outcome):.1%}",
        f"{fmean(first):.3f} s",
        f"{quantile(first, 0.5):.3f} s",
        f"{quantile(first, 0.99):.3f} s",
        f"{uneven:.2f}",
        f"{varied:.3f}",
        f"{seconds:.0f} s",
    )
    return f"| {' | '.join(cells)} |"


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.routing")
    parser.add_argument("--replicas", type=int, default=8)
    parser.add_argument("--policy", action="append", choices=list(POLICIES), help="only this one; repeatable")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trace", type=Path, help="a file in the format of Mooncake's traces")
    parser.add_argument("--speed", type=float, default=1.0, help="how much faster the trace is played")
    parser.add_argument("--requests", type=int, default=20_000, help="how many to make up")
    parser.add_argument("--load", type=float, default=2.0, help="made-up requests/s for each replica")
    parser.add_argument("--systems", type=int, default=100, help="how many made-up system prompts there are")
    parser.add_argument("--turns", type=float, default=Mix.turns, help="of a conversation, on average")
    parser.add_argument("--queue", choices=["home", "fifo"], default="home", help="see simulation.py")
    parser.add_argument("--slots", type=int, default=Machine.slots)
    parser.add_argument("--prefill", type=float, default=Machine.prefill, help="tokens/s")
    parser.add_argument("--cache", type=int, default=Machine.cache, help="KV cache of a replica, in tokens")
    return parser.parse_args()


def main() -> None:
    chosen = options()
    if chosen.trace:
        requests = read(chosen.trace, chosen.speed)
    else:
        rate = chosen.load * chosen.replicas / chosen.turns
        mix = Mix(rate=rate, systems=chosen.systems, turns=chosen.turns)
        requests = made_up(mix, chosen.requests, chosen.seed)
    machine = Machine(slots=chosen.slots, prefill=chosen.prefill, cache=chosen.cache)
    print(f"{len(requests)} requests in {requests[-1].at:.0f} s, {chosen.replicas} replicas\n")
    print(f"| {' | '.join(HEADINGS)} |\n|{'---|' * len(HEADINGS)}")
    for name in chosen.policy or POLICIES:
        began = time.perf_counter()
        outcome = simulate(
            name, requests, chosen.replicas, machine, seed=chosen.seed, home=chosen.queue == "home"
        )
        print(row(name, outcome, time.perf_counter() - began), flush=True)


if __name__ == "__main__":
    main()
