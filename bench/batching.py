"""What continuous batching brings: tokens/s of several clients over those of one, by `batch_size`.

    python -m bench.batching [--clients 8] [--tokens 128] [--rounds 5]

One client, then so many at the same time, in turns, each with its own prompt, through the whole service with
the embedded engine.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import processes
from bench.service import Service
from bench.streams import Stream, client
from deepseek_api_compat.engines.upstream import Upstream

MODEL = "tiny"


def models(slots: int) -> str:
    return f"""
[[models]]
name = "{MODEL}"
[[models.engines]]
kind = "llamacpp"
path = "smollm2-135m-instruct"
batch_size = {slots}
context = 1024
"""


async def rate(upstream: Upstream, clients: int, tokens: int) -> float:
    """Tokens a second of all clients together."""
    streams = [Stream(MODEL, f"Tell story number {number}.", tokens) for number in range(clients)]
    began = time.perf_counter()
    await asyncio.gather(*(stream.read(upstream) for stream in streams))
    return sum(stream.usage["completion_tokens"] for stream in streams) / (time.perf_counter() - began)


async def measure(service: Service, args: argparse.Namespace) -> None:
    upstream = client(service)
    found: dict[int, list[float]] = {1: [], args.clients: []}
    try:
        for _ in range(args.rounds):
            for clients in found:
                found[clients].append(await rate(upstream, clients, args.tokens))
    finally:
        await upstream.close()
    for clients, rates in found.items():
        print(f"{clients} clients: {median(rates):.0f} tokens/s")
    ratios = [many / one for one, many in zip(found[1], found[args.clients], strict=True)]
    print(f"ratio: {median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} pairs)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    processes.wait_for_quiet(10.0)
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory), models(args.clients))
        service.start(MODEL, patience=600.0)
        try:
            asyncio.run(measure(service, args))
        finally:
            service.stop()


if __name__ == "__main__":
    main()
