"""Our service as its users start it, on a free port with a data directory of its own."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import processes

COMMAND = str(Path(sys.executable).parent / "deepseek-api")


class Service:
    """`deepseek-api serve` with `models` (TOML), one worker, and a `key` whose limit is out of reach.

    start() may be called again after stop(); data directory, port and key stay.
    """

    def __init__(self, directory: Path, models: str = "", command: str = COMMAND) -> None:
        """`command`: the `deepseek-api` to start; another checkout's, to compare with it."""
        directory.mkdir(exist_ok=True)
        self._command = command
        self.data_dir = directory / "data"
        self.port = processes.free_port()
        self._config = directory / "config.toml"
        self._config.write_text(
            f'[server]\nport = {self.port}\nworkers = 1\ndata_dir = "{self.data_dir}"\n{models}'
        )
        self._log = directory / "serve.log"
        self._process: subprocess.Popen[bytes] | None = None
        create = [command, "keys", "create", "bench", "--rps", "1000000", "--quiet"]
        made = subprocess.run(
            [*create, "--data-dir", str(self.data_dir)], check=True, capture_output=True, text=True
        )
        self.key = made.stdout.strip()

    def start(self, model: str, patience: float = 60.0) -> float:
        """Start it, return when it has answered a question; the seconds that took."""
        question = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        with open(self._log, "ab") as log:
            began = time.monotonic()
            self._process = subprocess.Popen(
                [self._command, "serve", "--config", self._config], stdout=log, stderr=log
            )
        while time.monotonic() < began + patience and self._process.poll() is None:
            try:
                self.ask("/v1/chat/completions", question)
                return time.monotonic() - began
            except (ConnectionError, AskedTooEarly):
                time.sleep(0.002)
        self.stop()
        raise RuntimeError(f"the service does not answer:\n{self._log.read_text()[-2000:]}")

    def ask(self, path: str, body: object) -> Any:
        """The answer to a POST, decoded. Raises AskedTooEarly for a 503, RuntimeError for other errors."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60.0)
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        try:
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            text = response.read()
        finally:
            connection.close()
        if response.status == 503:
            raise AskedTooEarly
        answer = json.loads(text) if response.status == 200 else {}
        # Behind keep-alives an error comes with status 200.
        if answer.get("error", {}).get("code") == "engine_unavailable":
            raise AskedTooEarly
        if response.status != 200 or "error" in answer:
            raise RuntimeError(f"{path}: {response.status} {text[:500]!r}")
        return answer

    @property
    def worker(self) -> int:
        """The process id of its worker."""
        assert self._process is not None
        (pid,) = processes.children(self._process.pid, "gateway.worker")
        return pid

    def engine_socket(self) -> str:
        """Where the embedded engine listens, as its command line says."""
        assert self._process is not None
        (pid,) = processes.children(self._process.pid, "engines.llamacpp_server")
        arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return next(a.partition("=")[2] for a in arguments if a.startswith("--socket="))

    def stop(self) -> None:
        if self._process is not None:
            processes.stop(self._process, patience=40.0)
            self._process = None


class AskedTooEarly(Exception):
    """503: an engine is not ready yet."""
