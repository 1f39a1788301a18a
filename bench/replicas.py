"""Routing among real replicas: cache hits and TTFT of conversations, for each policy.

    python -m bench.replicas [--rounds 3] [--sessions 6] [--turns 5] [--replicas 2] [--slots 4]

The same conversations, with a system prompt that some share and pauses between turns, through the whole
service with llama.cpp engines that start with an empty cache. One policy after the other, in another order
each round. With more sessions than slots most of a cache is overwritten before its session comes back.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
from pathlib import Path
from statistics import mean

from bench import processes
from bench.service import Service
from bench.streams import Stream, client
from deepseek_api_compat.engines.upstream import Upstream
from deepseek_api_compat.gateway.routing import POLICIES

MODEL = "tiny"
WORDS = ("river", "stone", "light", "wind", "paper", "glass", "winter", "engine", "market", "letter")
SYSTEMS = 3  # different system prompts
SYSTEM, TURN, ANSWER = 200, 60, 24  # words of a system prompt and of a question, tokens of an answer


def models(policy: str, replicas: int, slots: int) -> str:
    return f"""
[[models]]
name = "{MODEL}"
temperature = 0.0
routing = "{policy}"
slow_start = 0.0
[[models.engines]]
kind = "llamacpp"
path = "smollm2-135m-instruct"
replicas = {replicas}
batch_size = {slots}
context = 2048
threads = 1
"""


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def converse(upstream: Upstream, number: int, turns: int) -> list[Stream]:
    """One conversation; the answers as they came."""
    system = random.Random(number % SYSTEMS)
    rng = random.Random(1000 + number)
    messages = [{"role": "system", "content": text(system, SYSTEM)}]
    answers = []
    for _ in range(turns):
        await asyncio.sleep(rng.expovariate(1.0))
        messages.append({"role": "user", "content": text(rng, TURN)})
        stream = Stream(MODEL, messages, ANSWER)
        await stream.read(upstream)
        messages.append({"role": "assistant", "content": stream.text})
        answers.append(stream)
    return answers


async def measure(service: Service, sessions: int, turns: int) -> tuple[float, float]:
    """Share of prompt tokens that were cached, and the mean TTFT in seconds."""
    upstream = client(service)
    try:
        found = await asyncio.gather(*(converse(upstream, number, turns) for number in range(sessions)))
    finally:
        await upstream.close()
    streams = [stream for answers in found for stream in answers]
    hits = sum(stream.usage["prompt_cache_hit_tokens"] for stream in streams)
    prompts = sum(stream.usage["prompt_tokens"] for stream in streams)
    return hits / prompts, mean(stream.ttft for stream in streams)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sessions", type=int, default=6)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4)
    args = parser.parse_args()
    processes.wait_for_quiet(10.0)
    found: dict[str, list[tuple[float, float]]] = {policy: [] for policy in POLICIES}
    for number in range(args.rounds):
        order = list(POLICIES)
        random.Random(number).shuffle(order)
        for policy in order:
            with tempfile.TemporaryDirectory() as directory:
                service = Service(Path(directory), models(policy, args.replicas, args.slots))
                service.start(MODEL, patience=600.0)
                try:
                    found[policy].append(asyncio.run(measure(service, args.sessions, args.turns)))
                finally:
                    service.stop()
    for policy, rounds in found.items():
        hits, ttft = mean(hit for hit, _ in rounds), mean(seconds for _, seconds in rounds)
        print(f"{policy:16} cached {hits:.1%}  mean TTFT {ttft:.3f} s")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
