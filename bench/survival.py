"""What clients notice when an engine is killed under them.

    python -m bench.survival [--streams 100] [--tokens 120] [--replicas 2] [--no-kill]
    python -m bench.survival --fakes [--streams 100] [--tokens 120] [--rounds 5]

So many streams of greedy answers are read from real llama.cpp engines, as many as there are slots. When each
has begun, one engine gets SIGKILL. Printed: how many answers are complete, how many failed, how long those
that lost their engine paused, and how many texts are those of an undisturbed run. Under batching the same
request does not always get the same greedy text; `--no-kill` says how often it differs all by itself.

With `--fakes` all streams begin at one of two fake engines, that one gets SIGKILL, and the other one has a
slot for each of them: what is left is the gateway's own time. Printed for each round: how many answers are
right to the last token, when the rest of each arrived at the other fake after the kill, and the pauses.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

from bench import processes
from bench.fakes import MODEL as FAKE
from bench.fakes import Fakes, Told
from bench.service import COMMAND, Service
from bench.streams import Stream, client

MODEL = "tiny"
CONTEXT = 512
GOAL = 0.2  # seconds from the kill to the job at another engine that has a slot
THINGS = [
    "lighthouse",
    "mountain",
    "river",
    "market",
    "library",
    "harbour",
    "desert",
    "orchestra",
    "garden",
    "train",
]


def prompt(number: int) -> str:
    return f"Tell story number {number} about a {THINGS[number % len(THINGS)]}."


def models(replicas: int, slots: int) -> str:
    return f"""
[limits]
max_queue = 1000
[[models]]
name = "{MODEL}"
temperature = 0.0
[[models.engines]]
kind = "llamacpp"
path = "smollm2-135m-instruct"
replicas = {replicas}
batch_size = {slots}
context = {CONTEXT}
"""


async def run(service: Service, args: argparse.Namespace, kill: bool) -> tuple[list[Stream], float]:
    """The streams, all of them ended, and when an engine was killed."""
    upstream = client(service)
    streams = [Stream(MODEL, prompt(number), args.tokens) for number in range(args.streams)]
    tasks = [asyncio.create_task(stream.read(upstream)) for stream in streams]
    try:
        await asyncio.gather(*(stream.began.wait() for stream in streams))
        if kill:
            os.kill(engines(service)[0]["pid"], signal.SIGKILL)
        at = time.perf_counter()
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await upstream.close()
    return streams, at


def engines(service: Service) -> list[dict[str, int]]:
    command = [COMMAND, "engines", "list", "--json", "--data-dir", str(service.data_dir)]
    found: list[dict[str, int]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def with_fakes(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fakes = Fakes(Path(directory))
        service = Service(Path(directory), fakes.models)
        service.start(FAKE)
        try:
            for _ in range(args.rounds):
                report(fakes.kill_under(service, args.streams, args.tokens))
        finally:
            service.stop()


def report(streams: list[Told]) -> None:
    away = [stream.away for stream in streams if stream.away is not None]
    wrong = [stream.problem for stream in streams if stream.problem]
    fast = sum(seconds <= GOAL for seconds in away)
    print(f"{len(streams)} streams: {len(streams) - len(wrong)} right, {len(away)} went on, {fast} in 200 ms")
    print(f"  at the other fake after {spread(away)}; pauses {spread([stream.pause for stream in streams])}")
    for problem in wrong[:3]:
        print(f"  wrong: {problem}")


def spread(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return "unknown"
    p99 = quantiles(seconds, n=100, method="inclusive")[98]
    found = (median(seconds), p99, max(seconds))
    return "p50 {:.0f} ms, p99 {:.0f} ms, most {:.0f} ms".format(*(1000 * one for one in found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=120)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--no-kill", action="store_true")
    parser.add_argument("--fakes", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    processes.wait_for_quiet(10.0)
    if args.fakes:
        with_fakes(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        service = Service(Path(directory), models(args.replicas, -(-args.streams // args.replicas)))
        service.start(MODEL, patience=600.0)
        try:
            undisturbed, _ = asyncio.run(run(service, args, kill=False))
            streams, at = asyncio.run(run(service, args, kill=not args.no_kill))
        finally:
            service.stop()
    complete = sum(stream.complete for stream in streams)
    same = sum(one.text == other.text for one, other in zip(streams, undisturbed, strict=True))
    print(f"{len(streams)} streams: {complete} complete, {len(streams) - complete} failed")
    print(f"texts as in the run before: {same}")
    if not args.no_kill:
        pauses = sorted((stream.pause(at) for stream in streams), reverse=True)
        lost = pauses[: -(-len(pauses) // args.replicas)]  # those of the killed engine waited longest
        p99 = quantiles(lost, n=100, method="inclusive")[98]
        print(
            f"pauses of those that lost it: p50 {median(lost):.2f} s, p99 {p99:.2f} s, most {lost[0]:.2f} s"
        )


if __name__ == "__main__":
    main()
