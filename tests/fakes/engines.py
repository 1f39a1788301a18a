"""Real llama.cpp servers, as the product starts them."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepseek_api_compat.engines.base import Endpoint


@contextmanager
def served(model: Path, *, slots: int, context: int) -> Iterator[Endpoint]:
    """A llama.cpp server, up."""
    with tempfile.TemporaryDirectory(prefix="engine-") as directory:
        path = f"{directory}/e.sock"
        program = [sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server"]
        options = [f"--model={model}", f"--socket={path}", f"--slots={slots}", f"--context={context}"]
        options.append("--threads=1")  # steady on a busy machine
        with subprocess.Popen(program + options, stderr=subprocess.DEVNULL) as process:
            try:
                while get(path, "/health") != 200:
                    assert process.poll() is None, "the engine did not start"
                    time.sleep(0.01)
                yield Endpoint(uds=path)
            finally:
                process.terminate()


def get(path: str, target: str) -> int:
    """Status of a GET over a Unix socket; 0 if nobody listens."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    try:
        connection.sock.connect(path)
        connection.request("GET", target)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()
