"""A real service in its own processes, as a user would start it, and what tests ask of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx

START_TIMEOUT = 120.0  # seconds; the first start of a machine fetches the default model
BIN = Path(sys.executable).parent


class Service:
    """`deepseek-api serve ARGS` on a free port, started and ready when the constructor returns.

    url: without a path. key: the admin key that the first start printed, else None. output: all it printed.
    """

    def __init__(
        self,
        data_dir: Path,
        *args: str,
        command: str = "serve",
        env: dict[str, str] | None = None,
        patience: float = START_TIMEOUT,
    ) -> None:
        self.data_dir = data_dir
        self.output = ""
        head = (
            [str(BIN / "start_server")] if command == "start_server" else [str(BIN / "deepseek-api"), command]
        )
        self.process = subprocess.Popen(
            [*head, "--port", "0", "--data-dir", str(data_dir), *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, **(env or {})},
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        if not self._ready.wait(patience) or self.process.poll() is not None:
            self.kill()
            raise AssertionError(f"the service did not start:\n{self.output}")
        self.url = self._word_after("local     ").removesuffix("/v1")
        self.port = int(self.url.rsplit(":", 1)[1])
        printed = self._word_after("API key   ")
        self.key = printed if printed.startswith("DSK-") else None

    def new_key(self, name: str = "test", *args: str) -> str:
        """A fresh key, made as an operator makes one."""
        return self.command("keys", "create", name, "--quiet", *args).strip()

    def engines(self) -> list[dict[str, Any]]:
        return list(json.loads(self.command("engines", "list", "--json")))

    def command(self, *args: str) -> str:
        argv = [str(BIN / "deepseek-api"), *args, "--data-dir", str(self.data_dir)]
        return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=60).stdout

    def client(self, key: str | None = None, **options: Any) -> httpx.Client:
        headers = {"authorization": f"Bearer {key or self.key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **options)

    def workers(self) -> list[int]:
        """Process ids of the gateway workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"gateway.worker" in _command_line(pid)]

    def stop(self, number: signal.Signals = signal.SIGINT, timeout: float = 60.0) -> int:
        """Ask it to leave; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout)
        self._reader.join(10)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def kill(self) -> None:
        self.stop(signal.SIGKILL)

    def _word_after(self, label: str) -> str:
        return self.output.split(label, 1)[1].split()[0]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.output += line
            if line.startswith("  -d '"):  # the last line of the example call
                self._ready.set()
        self._ready.set()


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return b""


def eventually(condition: Any, timeout: float = 30.0, what: str = "the condition") -> Any:
    """The first true value of `condition()`, asked often; fails after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.01)
    raise AssertionError(f"{what} did not come true within {timeout} s")
