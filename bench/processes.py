"""The neighbours in a measurement (mock upstream, load generator, nginx), and what a process costs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

HERE = Path(__file__).parent
BIN = HERE / "bin"

LOAD_CORE, GATEWAY_CORE = 0, 1  # mock and load share one core; what is measured has the other to itself

_TICK = os.sysconf("SC_CLK_TCK")
_NGINX_CONFIG = """\
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log {directory}/nginx.log;
worker_rlimit_nofile 16384;
events {{ worker_connections 8192; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000000;
    upstream mock {{
        server 127.0.0.1:{upstream};
        keepalive 2048;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://mock;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


def compile_programs() -> None:
    """Bring `bin/load` and `bin/mock` up to date. Raises CalledProcessError, or OSError without a `cc`."""
    BIN.mkdir(exist_ok=True)
    for name in ("load", "mock"):
        source, program = HERE / f"{name}.c", BIN / name
        if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(["cc", "-O2", "-o", program, source], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    """Wait until something listens on `port`. Raises RuntimeError if `process` ends or `patience` does."""
    end = time.monotonic() + patience
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1.0):
            return
        time.sleep(0.005)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")


def stop(process: subprocess.Popen[bytes], patience: float = 10.0) -> None:
    process.terminate()
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def pin(pid: int, core: int) -> None:
    """Keep all threads of a process on one core."""
    for task in os.listdir(f"/proc/{pid}/task"):
        os.sched_setaffinity(int(task), {core})


def children(pid: int, word: str) -> list[int]:
    """The children of `pid` whose command line contains `word`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if word in Path(f"/proc/{child}/cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(int(child))
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used; in steps of 10 ms."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICK


def machine_seconds() -> float:
    """CPU time that all processes have used, and what the hypervisor gave to others."""
    fields = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / _TICK  # all but idle and waiting for a disk


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores are busy now. Before a measurement that should be none."""
    before = machine_seconds()
    time.sleep(seconds)
    return (machine_seconds() - before) / seconds


def wait_for_quiet(patience: float) -> None:
    """Return when hardly anything runs, or after `patience` seconds."""
    end = time.monotonic() + patience
    while busy_cores() > 0.1 and time.monotonic() < end:
        pass


def memory_mb(pid: int) -> tuple[float, float]:
    """RSS and PSS in MB (10^6 bytes). PSS shares out the pages that several processes map."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    kib = {name.rstrip(":"): int(value) for name, value, *_ in map(str.split, lines)}
    return kib["Rss"] * 1024 / 1e6, kib["Pss"] * 1024 / 1e6


@contextlib.contextmanager
def mock() -> Iterator[tuple[int, int]]:
    """A mock upstream on the load core; its port and process id."""
    port = free_port()
    process = subprocess.Popen([BIN / "mock", str(port)])
    try:
        pin(process.pid, LOAD_CORE)
        wait_for_port(port, process)
        yield port, process.pid
    finally:
        stop(process)


def mock_counts(port: int) -> dict[str, int]:
    with urlopen(f"http://127.0.0.1:{port}/stats") as answer:
        counts: dict[str, int] = json.load(answer)
        return counts


def nginx_program() -> str | None:
    """Where nginx is. Debian keeps it off the path of ordinary users."""
    return shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")


@contextlib.contextmanager
def nginx(upstream: int, directory: Path) -> Iterator[tuple[int, int]]:
    """nginx as a plain proxy, one worker on the gateway core; its port and the worker's process id."""
    program = nginx_program()
    assert program is not None
    port = free_port()
    config = directory / "nginx.conf"
    config.write_text(_NGINX_CONFIG.format(directory=directory, upstream=upstream, port=port))
    # -e as well: before it reads its configuration it would complain about the system's log.
    process = subprocess.Popen([program, "-e", directory / "nginx.log", "-c", config])
    try:
        wait_for_port(port, process)
        urlopen(f"http://127.0.0.1:{port}/").close()  # then the worker has begun, not only the port
        (worker,) = children(process.pid, "nginx: worker")
        pin(worker, GATEWAY_CORE)
        yield port, worker
    finally:
        stop(process)


def load(port: int, key: str, arguments: str) -> dict[str, Any]:
    """One run of the load generator: what it printed. Raises RuntimeError for any answer but 200."""
    command = ["taskset", "-c", str(LOAD_CORE), str(BIN / "load"), "-P", str(port), "-k", key]
    run = subprocess.run([*command, *arguments.split()], check=True, capture_output=True)
    result: dict[str, Any] = json.loads(run.stdout)
    if result["non200"]:
        raise RuntimeError(f"port {port}, load {arguments}: {result['non200']} answers were not 200")
    return result
