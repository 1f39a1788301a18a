"""Two fake engines with slots to spare, to see what the gateway itself does when one of them is killed.

They are those of the tests. What they say next follows from all ids before it, so every answer can be checked
token by token, whatever engines it was made by; and they write down when each job came.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any, NamedTuple

from bench.service import Service
from bench.streams import Stream, client
from deepseek_api_compat import control

TESTS = Path(__file__).parents[1] / "tests"
sys.path.insert(0, str(TESTS))
language: Any = importlib.import_module("fakes.token_language")

MODEL = "fake"
KILLED, SPARE = 0, 1
SLOTS = 256
PACE = 0.05  # seconds a token


class Jobs(NamedTuple):
    """What a fake has written down: its process, and when each job came with which prompt."""

    pid: int
    came: list[tuple[float, list[int]]]


class Told(NamedTuple):
    """How one stream bore it. Seconds from the kill to the job at the other fake, and between two parts.

    problem: what is wrong with its text, if anything.
    """

    away: float | None
    pause: float
    problem: str


class Fakes:
    """The fakes of one service, whose `models` they are; files go to `directory`."""

    def __init__(self, directory: Path) -> None:
        self._order = directory / f"0-{KILLED}"
        self._record = directory / "record"
        self._record.mkdir()
        model = language.write_model(directory / "language.gguf")
        command = [sys.executable, str(TESTS / "fakes" / "token_engine.py")]
        command += [f"--orders={directory}", f"--record={self._record}", f"--pace={PACE}"]
        self.models = f"""
[[models]]
name = "{MODEL}"
[[models.engines]]
kind = "llamacpp"
path = "{model}"
command = {json.dumps(command)}
replicas = 2
batch_size = {SLOTS}
"""

    def jobs(self, replica: int) -> Jobs:
        """Of its present life."""
        pid = 0
        came: list[tuple[float, list[int]]] = []
        for line in (self._record / f"0-{replica}").read_text().splitlines():
            entry = json.loads(line)
            if isinstance(entry, int):
                pid, came = entry, []
            else:
                came.append((entry[0], entry[1]))
        return Jobs(pid, came)

    def kill_under(self, service: Service, streams: int, tokens: int) -> list[Told]:
        """So many streams begin at one fake, which is then killed while the other one has nothing to do."""
        while any(one["state"] != "ready" for one in control.call(service.data_dir, "engines.list")):
            time.sleep(0.1)  # the one that was killed the last time
        return asyncio.run(self._kill_under(service, streams, tokens))

    async def _kill_under(self, service: Service, streams: int, tokens: int) -> list[Told]:
        await operate(service, "engines.drain", SPARE)
        upstream = client(service)
        prompts = list(islice(long_prompts(tokens), streams))
        made = [Stream(MODEL, prompt, tokens) for prompt in prompts]
        tasks = [asyncio.create_task(stream.read(upstream)) for stream in made]
        try:
            await asyncio.gather(*(stream.began.wait() for stream in made))
            self._order.write_text(
                "stall"
            )  # none ends while the other fake comes back, however long it takes
            await operate(service, "engines.restart", SPARE)
            self._order.unlink()
            await asyncio.sleep(10 * PACE)
            pid = self.jobs(KILLED).pid
            at, killed = time.perf_counter(), time.monotonic()
            os.kill(pid, signal.SIGKILL)
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await upstream.close()
        jobs = self.jobs(SPARE)
        return [
            Told(went_on(ids_of(prompt), jobs, killed), stream.pause(at), problem(stream, prompt, tokens))
            for prompt, stream in zip(prompts, made, strict=True)
        ]


async def operate(service: Service, op: str, replica: int) -> None:
    await asyncio.to_thread(control.call, service.data_dir, op, model=MODEL, replica=replica)


def ids_of(prompt: str) -> list[int]:
    ids: list[int] = language.prompt([{"role": "user", "content": prompt}])
    return ids


def long_prompts(tokens: int) -> Iterator[str]:
    """Those whose answers do not end before so many tokens."""
    for number in count():
        prompt = f"Tell story number {number}."
        sequel = language.Sequel(ids_of(prompt))
        for _ in range(tokens):
            if (id := sequel.next()) == language.END:
                break
            sequel.feed(id)
        else:
            yield prompt


def went_on(prompt: list[int], jobs: Jobs, killed: float) -> float | None:
    """When a job that begins with the prompt came, behind which is what had been sent of its answer."""
    found = [at for at, ids in jobs.came if ids[: len(prompt)] == prompt and len(ids) > len(prompt)]
    return found[0] - killed if found else None


def problem(stream: Stream, prompt: str, tokens: int) -> str:
    if not stream.complete:
        return f"it was not complete: {stream.error}"
    if stream.usage["completion_tokens"] != tokens:
        return f"its usage says {stream.usage}"
    try:
        language.check(ids_of(prompt), language.Told(stream.text, "length", most=tokens))
    except language.Wrong as wrong:
        return str(wrong)
    return ""
