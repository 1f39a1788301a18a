"""What can be seen of a running service from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from fakes.service import Service, eventually
from fakes.wire import Wire, call, request


def metrics(service: Service) -> dict[str, float]:
    """Every sample of /metrics, by its name and labels."""
    answer = call(service.port, request("GET", "/metrics", b"", service.key))
    assert answer.status == 200, answer
    text = answer.body.decode()
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def idle(service: Service) -> bool:
    """Whether no slot is leased and nobody waits for one."""
    return not any(
        value
        for name, value in metrics(service).items()
        if name.startswith("deepseek_queue_length") or 'state="used"' in name
    )


def waiting(service: Service, model: str) -> int:
    """Requests in the model's queue."""
    return int(metrics(service)[f'deepseek_queue_length{{model="{model}"}}'])


def ready(service: Service) -> int:
    """The status of GET /ready."""
    return call(service.port, request("GET", "/ready")).status


def engine_lives(service: Service) -> list[tuple[str, int]]:
    """State and process of each engine: the same as long as nothing has happened to any."""
    return [(engine["state"], engine["pid"]) for engine in service.engines()]


def engine_slots(service: Service) -> list[dict[str, Any]]:
    """What the embedded engine itself says of its slots."""
    [socket] = (service.data_dir / "run" / "engines").glob("*.sock")
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://engine") as http:
        return list(http.get("/slots").raise_for_status().json())


def engine_busy(service: Service) -> int:
    """How many of the engine's slots are generating."""
    return sum(slot["is_processing"] for slot in engine_slots(service))


def log_of(service: Service) -> str:
    return (service.data_dir / "logs" / "gateway.log").read_text()


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def memory(pid: int) -> int:
    """Resident bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def descendants(pid: int) -> set[int]:
    """All processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            for child in map(int, (task / "children").read_text().split()):
                found |= {child} | descendants(child)
    return found


def engine_pid(service: Service) -> int | None:
    """The process of the embedded engine, if there is one; quicker than to ask the service."""
    for pid in descendants(service.process.pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            if b"llamacpp_server" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
    return None


def watched(service: Service) -> Iterator[Service]:
    """After every test: the same workers as before, nothing leased, no traceback in the log."""
    workers = service.workers()
    yield service
    Wire.close_all()
    assert service.workers() == workers, "a worker died"
    eventually(lambda: idle(service), what="all slots free and the queue empty")
    assert "Traceback" not in log_of(service), log_of(service)
