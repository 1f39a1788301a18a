"""What one key's flood does to another key's waiting, on the embedded engine.

    python -m bench.fairness [--seconds 120] [--streams 64] [--keys 8] [--tokens 64]

A quiet key asks again and again, one request at a time. Beside it the engine is saturated, in turns by keys
at their fair share (as many as there are slots, with one stream each) and by one key with many more streams.
The quiet key's time to its first token in the flood should be at most 1.2 times that beside fair shares.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from bench import processes
from bench.service import COMMAND, Service
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.upstream import Upstream

MODEL = "deepseek-v3"  # an alias of the embedded model
PAUSE = 0.25  # seconds between two requests of the quiet key
LOAD = "Tell a long story about a lighthouse keeper and the sea."
QUIET = "Name a colour."
TEXT = re.compile(rb'"content":"[^"]')


def new_key(service: Service, name: str) -> str:
    command = [COMMAND, "keys", "create", name, "--quiet", "--data-dir", str(service.data_dir)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Client:
    """One key's requests."""

    def __init__(self, service: Service, key: str, prompt: str, tokens: int) -> None:
        self._upstream = Upstream(
            Endpoint(port=service.port, headers={"Authorization": f"Bearer {key}"}), read_timeout=600.0
        )
        self._body = json.dumps(
            {
                "model": MODEL,
                "messages": [{"role": "user", "content": prompt}],
                "max_tokens": tokens,
                "stream": True,
            }
        ).encode()

    async def ask(self) -> float:
        """Seconds to the first token of one answer, which is read to its end."""
        began = time.perf_counter()
        response = await self._upstream.request("POST", "/v1/chat/completions", self._body)
        first = 0.0
        try:
            while data := await response.chunk():
                if not first and TEXT.search(data):
                    first = time.perf_counter() - began
        finally:
            response.close()
        if response.status != 200 or not first:
            raise RuntimeError(f"the service answered {response.status}")
        return first

    async def flood(self) -> None:
        while True:
            await self.ask()

    async def close(self) -> None:
        await self._upstream.close()


async def waits(quiet: Client, load: Sequence[Client], streams: int, seconds: float) -> list[float]:
    """The quiet key's times to the first token beside so many streams of these keys."""
    flood = [asyncio.create_task(load[n % len(load)].flood()) for n in range(streams)]
    found = []
    try:
        await asyncio.sleep(5.0)  # until the queue is as it will be
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found.append(await quiet.ask())
            await asyncio.sleep(PAUSE)
    finally:
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)
    return found


async def measure(service: Service, args: argparse.Namespace) -> dict[str, list[float]]:
    quiet = Client(service, new_key(service, "quiet"), QUIET, 1)
    load = [Client(service, new_key(service, f"load{n}"), LOAD, args.tokens) for n in range(args.keys)]
    found: dict[str, list[float]] = {"fair shares": [], "flood": []}
    try:
        await quiet.ask()
        for _ in range(args.rounds):
            for name, keys, streams in (
                ("fair shares", load, len(load)),
                ("flood", load[:1], args.streams),
            ):
                found[name] += await waits(quiet, keys, streams, args.seconds / args.rounds)
    finally:
        for client in (quiet, *load):
            await client.close()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="of each kind of load")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--streams", type=int, default=64, help="of the flood")
    parser.add_argument("--keys", type=int, default=8, help="slots of the engine")
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    processes.wait_for_quiet(10.0)
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory))
        service.start(MODEL, patience=600.0)
        try:
            found = asyncio.run(measure(service, args))
        finally:
            service.stop()
    p99 = {}
    for name, seconds in found.items():
        p99[name] = quantiles(seconds, n=100, method="inclusive")[98]
        print(f"{name}: {len(seconds)} requests, p50 {median(seconds):.3f} s, p99 {p99[name]:.3f} s")
    print(f"flood / fair shares, p99: {p99['flood'] / p99['fair shares']:.2f} (goal: <= 1.2)")


if __name__ == "__main__":
    main()
