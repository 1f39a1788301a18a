"""The service under test and its neighbours: a real one, with real and fake engines behind it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from chaos.upstream import Upstream
from deepseek_api_compat import control
from deepseek_api_compat.errors import SetupError
from fakes import token_engine, token_language
from fakes.configs import ENVIRONMENT, TINY
from fakes.observe import metrics
from fakes.service import Service

Replica = tuple[str, int]
WORKERS = 2
REAL: list[Replica] = [("real", 0), ("real", 1)]
MANAGED: list[Replica] = [("fake", 0), ("fake", 1)]
ATTACHED: Replica = ("fake", 2)
FAKES = [*MANAGED, ATTACHED]
SLOTS = 4


class Setting:
    """Starts it all; `close` leaves nothing behind. keys: by the names that asks use."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.orders = directory / "orders"
        self.orders.mkdir()
        self.upstream = Upstream()
        self._attached: subprocess.Popen[str] | None = None
        self._port = 0
        try:
            self.start_attached()
            model = token_language.write_model(directory / "language.gguf")
            config = directory / "config.toml"
            config.write_text(self._config(model))
            self.service = Service(directory / "data", "--config", str(config), env=ENVIRONMENT)
        except BaseException:
            self.close()
            raise
        self.keys = {
            "free": self.service.new_key("free", "--rps", "0"),
            "limited": self.service.new_key("limited", "--rps", "2", "--concurrency", "2"),
        }
        assert self.service.key is not None
        self.admin = self.service.key

    def close(self) -> None:
        try:
            if hasattr(self, "service") and self.service.process.poll() is None:
                self.service.kill()
        finally:
            if self._attached is not None:
                self._attached.kill()
                self._attached.wait()
            self.upstream.close()

    def start_attached(self) -> None:
        """The engine that is not the service's own; again on its port if it has died."""
        if self._attached is not None and self._attached.poll() is None:
            return
        argv = [sys.executable, token_engine.__file__, f"--orders={self.orders}", "--name=attached"]
        argv += [f"--parallel={SLOTS}", f"--port={self._port}"]
        self._attached = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        assert self._attached.stdout is not None
        self._port = int(self._attached.stdout.readline())
        self._attached.stdout.close()

    def order(self, replica: Replica, order: str) -> None:
        """Tell a fake how to behave; "": well."""
        name = "attached" if replica == ATTACHED else f"1-{replica[1]}"
        if order:
            part = self.orders / f".{name}"
            part.write_text(order)
            part.rename(self.orders / name)
        else:
            (self.orders / name).unlink(missing_ok=True)

    def pid(self, replica: Replica) -> int | None:
        found = [one["pid"] for one in self.engines() if (one["model"], one["replica"]) == replica]
        return int(found[0]) if found and found[0] else None

    def engines(self) -> list[dict[str, Any]]:
        return list(self.operate("engines.list"))

    def operate(self, op: str, **params: Any) -> Any:
        return control.call(self.service.data_dir, op, **params)

    def resume(self) -> None:
        """Let everything go on that was stopped by a signal."""
        for pid in [*self.service.workers(), *(one["pid"] for one in self.engines() if one["pid"])]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def heal(self) -> None:
        """End all faults; returns when every engine is ready. Raises AssertionError if one stays away."""
        for replica in FAKES:
            self.order(replica, "")
        self.upstream.order = ""
        self.start_attached()
        self.resume()
        for one in self.engines():
            if one["state"] in ("drained", "failed"):
                self.restart((one["model"], one["replica"]))
        until(lambda: all(one["state"] == "ready" for one in self.engines()), 60, "all engines ready")
        until(lambda: len(self.service.workers()) == WORKERS, 30, "all workers there")

    def restart(self, replica: Replica) -> None:
        """As an operator does; that one is under way already is no matter."""
        with suppress(SetupError):
            self.operate("engines.restart", model=replica[0], replica=replica[1], wait=False)

    def metrics(self) -> dict[str, float]:
        return metrics(self.service)

    def _config(self, model: Path) -> str:
        fake = f'["{sys.executable}", "{token_engine.__file__}", "--orders={self.orders}"]'
        return f"""
[server]
workers = {WORKERS}
first_event_timeout = 2.0
keep_alive_interval = 1.0
write_timeout = 30.0
[limits]
max_queue = 60
queue_timeout = 20.0
[log]
requests = false
[[models]]
name = "real"
temperature = 0.0
ready_timeout = 20.0
[[models.engines]]
kind = "llamacpp"
path = "{TINY}"
replicas = {len(REAL)}
batch_size = {SLOTS}
context = 512
threads = 1
stall_timeout = 3.0
[[models]]
name = "fake"
ready_timeout = 20.0
[[models.engines]]
kind = "llamacpp"
path = "{model}"
command = {fake}
replicas = {len(MANAGED)}
batch_size = {SLOTS}
stall_timeout = 3.0
read_timeout = 10.0
[[models.engines]]
kind = "llamacpp"
base_url = "http://127.0.0.1:{self._port}"
path = "{model}"
batch_size = {SLOTS}
stall_timeout = 3.0
read_timeout = 10.0
[[models]]
name = "relay"
[[models.engines]]
kind = "openai"
base_url = "{self.upstream.url}"
model = "their-model"
read_timeout = 5.0
"""


def until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait for it. Raises AssertionError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"{what}: not within {seconds:g} s")
        time.sleep(0.2)
