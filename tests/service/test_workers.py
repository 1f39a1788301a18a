"""Processes die and are asked to leave; what can go on does, and nothing is left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame
from fakes.configs import ENGINE, PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request
from fakes.observe import alive, descendants, engine_busy, idle, log_of, metrics, ready, waiting
from fakes.service import BIN, Service, eventually
from fakes.wire import Answer, Wire, call, request, sse, text_of

PATH = "/v1/chat/completions"
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}}  # token 2 would end the answer


def ask(service: Service, body: object) -> Wire:
    return Wire(service.port).send(request("POST", PATH, body, service.key))


def post(service: Service, body: object) -> Answer:
    return call(service.port, request("POST", PATH, body, service.key))


def pid_of(service: Service, wire: Wire) -> int:
    """The worker that holds the other end of this connection."""
    local, remote = (f":{port:04X}" for port in (service.port, wire.socket.getsockname()[1]))
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    [inode] = [row[9] for row in rows if row[1].endswith(local) and row[2].endswith(remote)]
    for pid in service.workers():
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if os.readlink(fd) == f"socket:[{inode}]":
                    return pid
    raise AssertionError("nobody holds it")


def pair(service: Service, body: object) -> tuple[Wire, Wire]:
    """Two streams that have begun, at different workers."""
    wires = {}
    for _ in range(50):
        wire = ask(service, body)
        wire.head()
        wire.chunk()
        pid = pid_of(service, wire)
        if pid in wires:
            wire.close()
            eventually(lambda: metrics_used(service) == len(wires))
            continue
        wires[pid] = wire
        if len(wires) == 2:
            return tuple(wires.values())
    raise AssertionError("all connections go to one worker")


def metrics_used(service: Service) -> float:
    return sum(value for name, value in metrics(service).items() if 'state="used"' in name)


# A worker dies


def test_a_killed_worker_comes_back_and_the_other_goes_on(engine_service: Service):
    service = engine_service
    lost, kept = pair(service, chat("tiny", "Count.", stream=True, **LONG))
    others = set(service.workers()) - {pid_of(service, lost)}
    killed = pid_of(service, lost)
    queued = [ask(service, chat("tiny", stream=True, max_tokens=2)) for _ in range(3)]
    eventually(lambda: waiting(service, "tiny") >= 2, what="a queue")
    os.kill(killed, signal.SIGKILL)

    # Its slot goes to those who wait, as far as they are at the other worker.
    eventually(lambda: waiting(service, "tiny") == 0, what="an empty queue")
    eventually(lambda: metrics_used(service) == 1, what="one slot in use")
    assert kept.chunk()
    with pytest.raises(ConnectionError):
        list(iter(lost.chunk, b""))
    for wire in queued:
        with suppress(ConnectionError):  # it was at the killed one
            assert wire.answer().body.endswith(b"data: [DONE]\n\n")

    eventually(lambda: len(service.workers()) == 2, what="a new worker")
    assert killed not in service.workers()
    assert others < set(service.workers())
    kept.close()
    eventually(lambda: idle(service), what="all slots free")
    pair(service, chat("tiny", "Count.", stream=True, **LONG))


def test_a_killed_workers_slots_are_free_within_a_second(engine_service: Service):
    service = engine_service
    wires = [ask(service, chat("tiny", "Count.", stream=True, **LONG)) for _ in range(2)]
    for wire in wires:
        wire.head()
    eventually(lambda: engine_busy(service) == 2, what="the engine at work")
    for pid in service.workers():
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: engine_busy(service) == 0, timeout=5, what="free slots at the engine")
    eventually(lambda: len(service.workers()) == 2, what="new workers")
    eventually(lambda: ready_or_none(service) == 200, what="ready")
    eventually(lambda: metrics_used(service) == 0, what="no lease")
    assert post(service, chat("tiny", max_tokens=2)).status == 200
    assert "Traceback" not in log_of(service)


def ready_or_none(service: Service) -> int | None:
    with suppress(ConnectionError):
        return ready(service)
    return None


def test_a_restarted_worker_knows_the_keys(engine_service: Service):
    service = engine_service
    service.new_key("kept")
    for pid in service.workers():
        os.kill(pid, signal.SIGKILL)
    late = service.new_key("late")  # while nobody is there to confirm it
    eventually(lambda: ready_or_none(service) == 200, what="ready")
    eventually(lambda: len(service.workers()) == 2, what="new workers")
    for _ in range(20):
        assert call(service.port, request("GET", "/v1/models", b"", late)).status == 200


# The service is asked to leave


@pytest.fixture
def own(request: pytest.FixtureRequest, start, upstream: ChatUpstream) -> Iterator[Service]:
    """A service of the test's own, which it may end: a relay with two workers, which waits at its end."""
    config = PATIENT.replace("[limits]", f"drain_timeout = {request.param}\n[limits]")
    service = start(config + upstream_model("relay", upstream), "--workers", "2")
    children = descendants(service.process.pid)
    assert len(children) >= 2
    yield service
    if service.process.poll() is None:
        service.kill()
    eventually(lambda: not any(map(alive, children)), what="no process left")


PATIENTLY, HASTILY = (pytest.mark.parametrize("own", [seconds], indirect=True) for seconds in (60, 0.5))


def stream_until(ended: asyncio.Event):
    """Events until then, and an orderly end."""

    async def play(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD)
        while not ended.is_set():
            await peer.send(frame(event("a")))
            await asyncio.sleep(0.05)
        await peer.send(frame(DONE) + b"0\r\n\r\n")

    return play


@PATIENTLY
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_drains(own: Service, upstream: ChatUpstream, number: signal.Signals):
    ended = asyncio.Event()
    upstream.play(stream_until(ended))
    streaming, idle_one = ask(own, chat("relay", stream=True)), Wire(own.port)
    idle_one.send(request("GET", "/health")).answer()
    streaming.head()
    streaming.chunk()
    own.process.send_signal(number)
    eventually(lambda: refused(own.port), what="new connections refused")
    assert idle_one.ended()
    rest = streaming.chunk()
    upstream.run(ended.set)
    rest += b"".join(iter(streaming.chunk, b""))
    assert set(text_of(rest)) == {"a"}
    assert own.stop() == 0


def refused(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except ConnectionRefusedError:
        return True
    return False


@HASTILY
def test_a_stream_longer_than_the_drain_is_told(own: Service, upstream: ChatUpstream):
    upstream.play(stream_until(asyncio.Event()))
    with ask(own, chat("relay", stream=True)) as wire:
        wire.head()
        wire.chunk()
        own.process.send_signal(signal.SIGTERM)
        *_, last = sse(b"".join(iter(wire.chunk, b"")))
    assert json.loads(last)["error"]["code"] == "engine_unavailable"
    assert own.stop() == 0


@HASTILY
def test_an_answer_longer_than_the_drain_is_an_error(own: Service, upstream: ChatUpstream):
    async def never(peer: Peer, _: Request) -> None:
        await upstream.leave(peer)

    upstream.play(never)
    with ask(own, chat("relay")) as wire:
        upstream.request()
        own.process.send_signal(signal.SIGTERM)
        answer = wire.answer()
    assert json.loads(answer.body)["error"]["code"] == "engine_unavailable"
    assert own.stop() == 0


@PATIENTLY
def test_a_second_ctrl_c_ends_the_waiting(own: Service, upstream: ChatUpstream):
    upstream.play(stream_until(asyncio.Event()))
    with ask(own, chat("relay", stream=True)) as wire:
        wire.head()
        began = time.monotonic()
        own.process.send_signal(signal.SIGINT)
        eventually(lambda: refused(own.port), what="new connections refused")
        assert own.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 50, "it would wait for 60"


# The supervisor dies, and two of them


def test_nothing_outlives_a_killed_supervisor(start):
    service = start(PATIENT + ENGINE, "--workers", "2")
    wire = ask(service, chat("tiny", "Count.", stream=True, **LONG))
    wire.head()
    # Two workers, their template processes, an engine.
    eventually(lambda: len(descendants(service.process.pid)) == 5, what="all processes")
    children = descendants(service.process.pid)
    service.process.kill()
    eventually(lambda: not any(map(alive, children)), what="no process left")
    service.kill()
    with pytest.raises(ConnectionError):
        list(iter(wire.chunk, b""))


def test_it_starts_again_where_it_was_killed(start, upstream: ChatUpstream):
    config = PATIENT + upstream_model("relay", upstream)
    first = start(config)
    key = first.key
    first.kill()
    second = start(config, data_dir=first.data_dir)
    assert second.key is None, "the key is shown once"
    assert call(second.port, request("POST", PATH, chat("relay"), key)).status == 200
    assert second.stop() == 0


def test_one_service_for_a_data_directory(relay: Service):
    argv = [BIN / "deepseek-api", "serve", "--port", "0", "--data-dir", relay.data_dir]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert second.stdout == ""
    [line] = second.stderr.splitlines()
    assert "already running" in line
    assert str(relay.data_dir) in line
    assert post(relay, chat("relay")).status == 200
    assert json.loads(relay.command("keys", "list", "--json"))
