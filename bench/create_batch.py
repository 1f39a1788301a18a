"""Requests per second of the client's `create_batch`, by its `batch_size`, against the embedded engine.

    python -m bench.create_batch [--sizes 1 4 8 16] [--requests 32] [--tokens 64] [--rounds 3]

The engine has as many slots as the largest batch; the sizes take turns. Each request has a prompt of its own
and an answer of exactly so many tokens.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from bench import processes
from bench.service import Service
from deepseek_api_compat import OpenAI

MODEL = "tiny"
ENDS = {"0": -100, "2": -100}  # the tokens of the embedded model that would end an answer early


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


def rate(client: OpenAI, size: int, count: int, tokens: int, seed: int) -> float:
    """Requests a second. Raises RuntimeError if an answer is short."""
    requests = [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": f"Tell story number {number} of volume {seed}."}],
            "max_tokens": tokens,
            "logit_bias": ENDS,
        }
        for number in range(count)
    ]
    began = time.perf_counter()
    answers = client.chat.completions.create_batch(requests, batch_size=size)
    seconds = time.perf_counter() - began
    if short := [answer for answer in answers if answer.usage.completion_tokens != tokens]:
        raise RuntimeError(f"an answer is not complete: {short[0]}")
    return count / seconds


def measure(service: Service, args: argparse.Namespace) -> None:
    found: dict[int, list[float]] = {size: [] for size in args.sizes}
    with OpenAI(api_key=service.key, base_url=f"http://127.0.0.1:{service.port}/v1") as client:
        rate(client, max(args.sizes), max(args.sizes), 8, 0)  # what an engine does only once is not counted
        for turn in range(1, args.rounds + 1):
            for size in args.sizes:
                found[size].append(rate(client, size, args.requests, args.tokens, turn * 1000 + size))
    one = found[args.sizes[0]]
    for size, rates in found.items():
        ratio = median(many / single for single, many in zip(one, rates, strict=True))
        spread = f"{min(rates):.2f} to {max(rates):.2f}"
        print(f"  batch_size {size:2}: {median(rates):.2f} requests/s ({spread}), {ratio:.2f} of the first")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory), models(max(args.sizes)))
        service.start(MODEL, patience=600.0)
        try:
            processes.wait_for_quiet(10.0)
            print(f"beside other work on {processes.busy_cores():.1f} cores:", flush=True)
            measure(service, args)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
