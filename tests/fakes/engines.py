"""Real llama.cpp servers, as the product starts them."""

from __future__ import annotations

import http.client
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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


@contextmanager
def over_tcp(path: str) -> Iterator[int]:
    """A port of this machine that leads to a Unix socket."""
    listener = socket.create_server(("127.0.0.1", 0))

    def pass_on(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source:
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def accept() -> None:
        with suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(path)
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=pass_on, args=pair, daemon=True).start()

    thread = threading.Thread(target=accept, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
        listener.close()


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
