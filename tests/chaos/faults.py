"""What is done to the service, one thing every few seconds, drawn from one seed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from chaos import upstream
from chaos.setting import ATTACHED, FAKES, MANAGED, REAL, Replica, Setting
from deepseek_api_compat.errors import SetupError
from fakes import token_engine


class Fault(NamedTuple):
    """what: a word of `DEEDS`. after: seconds since the one before. for_: seconds until it is healed."""

    after: float
    what: str
    replica: Replica
    order: str
    for_: float
    worker: int


DEEDS = {
    "kill": 3,
    "terminate": 2,
    "stop": 3,
    "order": 10,
    "order all": 1,
    "relay": 4,
    "worker": 1,
    "freeze": 1,
    "drain": 2,
    "restart": 1,
    "restart model": 1,
}


def faults(dice: Random) -> Iterator[Fault]:
    """For ever. What is done depends on the dice alone."""
    while True:
        what = dice.choices(list(DEEDS), list(DEEDS.values()))[0]
        replica = dice.choice(
            REAL if what == "stop" else FAKES if what.startswith("order") else [*REAL, *MANAGED]
        )
        if what == "drain" and dice.random() < 0.3:
            replica = ATTACHED
        order = dice.choice(upstream.ORDERS if what == "relay" else token_engine.ORDERS)
        yield Fault(dice.uniform(1, 4), what, replica, order, dice.uniform(1, 7), dice.randrange(2))


@dataclass
class Chaos:
    """Carries faults out. worker_deaths: time.monotonic() of each; done: how often what was done."""

    setting: Setting
    worker_deaths: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    _healing: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, dice: Random, until: float) -> None:
        """Until that time.monotonic(); then everything is healed, or about to be."""
        for fault in faults(dice):
            if time.monotonic() + fault.after > until:
                break
            await asyncio.sleep(fault.after)
            print(time.strftime("%H:%M:%S"), told(fault), flush=True)
            self.done[fault.what] += 1
            await asyncio.to_thread(self._do, fault)
            task = asyncio.create_task(self._heal(fault))
            self._healing.add(task)
            task.add_done_callback(self._healing.discard)
        await asyncio.gather(*self._healing)

    def _do(self, fault: Fault) -> None:
        setting, replica = self.setting, fault.replica
        if fault.what in ("kill", "terminate", "stop"):
            number = {"kill": signal.SIGKILL, "terminate": signal.SIGTERM, "stop": signal.SIGSTOP}[fault.what]
            if pid := setting.pid(replica):
                send(pid, number)
        elif fault.what in ("worker", "freeze"):
            workers = setting.service.workers()
            if fault.worker < len(workers):
                if fault.what == "worker":
                    self.worker_deaths.append(time.monotonic())
                send(workers[fault.worker], signal.SIGKILL if fault.what == "worker" else signal.SIGSTOP)
        elif fault.what.startswith("order"):
            for one in FAKES if fault.what == "order all" else [replica]:
                setting.order(one, fault.order)
        elif fault.what == "relay":
            setting.upstream.order = fault.order  # type: ignore[assignment]
        elif fault.what == "drain":
            with suppress(SetupError):
                setting.operate("engines.drain", model=replica[0], replica=replica[1])
        elif fault.what == "restart":
            setting.restart(replica)
        elif fault.what == "restart model":
            with suppress(SetupError):
                setting.operate("engines.restart", model=replica[0], wait=False)

    async def _heal(self, fault: Fault) -> None:
        await asyncio.sleep(fault.for_ if fault.what != "freeze" else fault.for_ / 4)
        await asyncio.to_thread(self._undo, fault)

    def _undo(self, fault: Fault) -> None:
        setting = self.setting
        if fault.what in ("stop", "freeze"):
            setting.resume()
        elif fault.what.startswith("order"):
            for one in FAKES if fault.what == "order all" else [fault.replica]:
                setting.order(one, "")
            setting.start_attached()
        elif fault.what == "relay":
            setting.upstream.order = ""
        elif fault.what == "drain":
            setting.restart(fault.replica)
        for engine in setting.engines():
            if engine["state"] == "failed":  # given up after many deaths: an operator's turn
                self.done["given up"] += 1
                setting.restart((engine["model"], engine["replica"]))


def told(fault: Fault) -> str:
    """What is done, and to whom."""
    if fault.what in ("relay", "order all"):
        return f"{fault.what} {fault.order}"
    if fault.what in ("worker", "freeze"):
        return f"{fault.what} {fault.worker}"
    order = fault.order if fault.what == "order" else ""
    return f"{fault.what} {fault.replica[0]} {fault.replica[1]} {order}".rstrip()


def send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
