"""A real engine with the default model, started once for all tests that ask for it."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.llamacpp import LlamaCpp


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The prepared default model; fetched if this machine has none."""
    override = os.environ.get("DEEPSEEK_TEST_MODEL")
    if override:
        return Path(override)
    from deepseek_api_compat.models.prepared import default_model

    return default_model()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path short enough for a Unix socket, whatever the name of the test."""
    directory = tempfile.mkdtemp(prefix="engine-")
    yield Path(directory) / "run" / "engine.sock"
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def engine_endpoint(model_path: Path) -> Iterator[Endpoint]:
    """A llama.cpp server with 8 slots of 1024 tokens."""
    with tempfile.TemporaryDirectory(prefix="engine-") as directory:
        path = f"{directory}/e.sock"
        program = [sys.executable, "-m", "deepseek_api_compat.engines.llamacpp_server"]
        options = [f"--model={model_path}", f"--socket={path}", "--slots=8", "--context=1024"]
        options.append("--threads=1")  # steady on a busy machine
        with subprocess.Popen(program + options, stderr=subprocess.DEVNULL) as process:
            try:
                while get(path, "/health") != 200:
                    assert process.poll() is None, "the engine did not start"
                    time.sleep(0.01)
                yield Endpoint(uds=path)
            finally:
                process.terminate()


@pytest.fixture
async def engine(engine_endpoint: Endpoint) -> AsyncIterator[LlamaCpp]:
    engine = LlamaCpp(engine_endpoint)
    yield engine
    await engine.close()


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
