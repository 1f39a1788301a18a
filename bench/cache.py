"""What the engine's prefix cache saves: TTFT by the share of the prompt that it holds already.

    python -m bench.cache [--tokens 1500] [--rounds 8] [--turns 6]

First prompts of the same length whose first 0, 25, 50 and 90 percent were asked just before, interleaved;
then a conversation, each turn with its history cached and, under another first word, without. Every TTFT is
that of a stream through the whole service with the embedded engine, one at a time.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import tempfile
from pathlib import Path
from statistics import median

from bench import processes
from bench.service import Service
from bench.streams import Stream, client
from deepseek_api_compat.engines.upstream import Upstream

MODEL = "tiny"
SHARES = (0, 25, 50, 90)
WORDS = ("river", "stone", "light", "wind", "paper", "glass", "winter", "engine", "market", "letter")
MODELS = f"""
[[models]]
name = "{MODEL}"
[[models.engines]]
kind = "llamacpp"
path = "smollm2-135m-instruct"
batch_size = 1
context = 8192
"""


def text(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(words))


async def ask(upstream: Upstream, prompt: str) -> Stream:
    stream = Stream(MODEL, prompt, 8)
    await stream.read(upstream)
    return stream


async def shares(upstream: Upstream, tokens: int, rounds: int) -> None:
    rng = random.Random(1)
    found: dict[int, list[float]] = {share: [] for share in SHARES}
    told: dict[int, list[float]] = {share: [] for share in SHARES}
    for _ in range(rounds):
        for share in SHARES:
            known = tokens * share // 100
            shared = f"{rng.random()} {text(rng, known)}"
            await ask(upstream, shared)
            stream = await ask(upstream, f"{shared} {text(rng, tokens - known)}")
            found[share].append(stream.ttft)
            told[share].append(stream.usage["prompt_cache_hit_tokens"] / stream.usage["prompt_tokens"])
    whole = median(found[0])
    for share in SHARES:
        ttft = median(found[share])
        saved = f"{1 - ttft / whole:.0%} less" if share else ""
        print(f"shared {share:2} %: TTFT {ttft:.3f} s, told as cached {median(told[share]):.0%}  {saved}")


async def conversation(upstream: Upstream, turns: int) -> None:
    rng = random.Random(2)
    found: dict[str, list[float]] = {"cached": [], "not cached": []}
    said = ""
    for turn in range(turns):
        said += f" {text(rng, 120)}"
        for kind in found:
            begin = "Listen" if kind == "cached" else f"{rng.random()}"
            stream = await ask(upstream, f"{begin}: {said}")
            if turn:
                found[kind].append(stream.ttft)
        # The turn without a cache has taken the only slot: put the conversation back.
        await ask(upstream, f"Listen: {said}")
    cached, fresh = (median(found[kind]) for kind in ("cached", "not cached"))
    print(
        f"a conversation of {turns} turns: TTFT {cached:.3f} s with its history cached, {fresh:.3f} s without"
    )
    print(f"{1 - cached / fresh:.0%} less (goal: at least 40 %)")


async def measure(service: Service, args: argparse.Namespace) -> None:
    upstream = client(service)
    try:
        await shares(upstream, args.tokens, args.rounds)
        await conversation(upstream, args.turns)
    finally:
        await upstream.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1500, help="of a prompt, about")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--turns", type=int, default=6, help="of the conversation")
    args = parser.parse_args()
    processes.wait_for_quiet(10.0)
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory), MODELS)
        service.start(MODEL, patience=600.0)
        try:
            asyncio.run(measure(service, args))
        finally:
            service.stop()


if __name__ == "__main__":
    main()
