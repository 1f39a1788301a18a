"""A service under mixed load, while its engines are killed, stopped, slowed and made to lie.

    make chaos, make chaos-smoke, or:
    PYTHONPATH=tests python -m chaos --seconds 90 --seed 1

docs/resilience.md, "Chaos test", says what is done and what must hold. Ends with 1 if something did not.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from chaos import audit
from chaos.exchange import described
from chaos.faults import Chaos
from chaos.load import Load
from chaos.setting import Setting

WARM_UP = 10.0  # seconds of load before the state of rest is noted
MEMORY_AFTER = 60.0  # seconds of a process's life after which its memory must be flat
SHOWN = 8  # violations that are printed in full


async def run(setting: Setting, seconds: float, clients: int, seed: int, log: Path | None) -> list[str]:
    """Everything that did not hold."""
    chaos = Chaos(setting)
    load = Load(setting.service.port, setting.keys, seed, chaos.worker_deaths)
    await load.run(clients, time.monotonic() + WARM_UP)
    before = await asyncio.to_thread(audit.at_rest, setting)
    print(f"at rest: {before}", flush=True)

    watch = audit.MemoryWatch(MEMORY_AFTER)
    end = time.monotonic() + seconds
    watching = asyncio.create_task(look(setting, watch))
    try:
        await asyncio.gather(chaos.run(random.Random(f"{seed} faults"), end), load.run(clients, end))
    finally:
        watching.cancel()
    await asyncio.to_thread(setting.heal)
    print(f"done: {dict(chaos.done)}; {len(chaos.worker_deaths)} workers died")
    problems = await asyncio.to_thread(audit.rested, setting, before)
    report(load)
    if log is not None:
        await asyncio.to_thread(write, log, load)
    problems += [
        f"{exchange.ask.model or 'malformed'}: {fate.why}\n{described(exchange)}"
        for exchange, fate in load.fates
        if fate.kind == "wrong"
    ]
    problems += watch.grown(processes(setting)) if seconds >= 5 * MEMORY_AFTER else []
    problems += audit.tracebacks(setting)
    problems += await asyncio.to_thread(audit.books, setting, load.fates)
    return problems


def write(log: Path, load: Load) -> None:
    log.write_text("".join(f"{fate}\n{described(exchange)}\n" for exchange, fate in load.fates))


async def look(setting: Setting, watch: audit.MemoryWatch) -> None:
    while True:
        watch.look(processes(setting), time.monotonic())
        await asyncio.sleep(2.0)


def processes(setting: Setting) -> list[int]:
    return [setting.service.process.pid, *setting.service.workers()]


def report(load: Load) -> None:
    kinds = Counter((exchange.ask.model or "malformed", fate.kind) for exchange, fate in load.fates)
    for (model, kind), count in sorted(kinds.items()):
        print(f"{model} {kind}: {count}")
    why = Counter(fate.why.split(" of ")[0][:110] for _, fate in load.fates if fate.kind == "failed")
    for reason, count in why.most_common(12):
        print(f"failed: {reason}: {count}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--seed", type=int, default=random.randrange(1, 10**6))
    parser.add_argument("--clients", type=int, default=30)
    parser.add_argument("--keep", type=Path, help="empty folder in which data, logs and fates.txt stay")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        log = options.keep and options.keep / "fates.txt"
        setting = Setting(options.keep or Path(temporary))
        try:
            problems = asyncio.run(run(setting, options.seconds, options.clients, options.seed, log))
            if (code := setting.service.stop()) != 0:
                problems.append(f"the service ended with {code}")
        finally:
            setting.close()
    for problem in sorted(problems, key=len)[:SHOWN]:
        print(f"VIOLATION {problem}")
    print(f"seed {options.seed}: {len(problems)} violations")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
