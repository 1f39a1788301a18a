"""A service whose disk is really full: it does what is declared, and writes everything down in the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from fakes import ledger
from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, answering_all, event, frame, usage_event
from fakes.configs import IMPATIENT, chat, upstream_model
from fakes.http_server import Peer, Request
from fakes.observe import metrics
from fakes.service import Service, eventually
from fakes.small_disk import fill, in_namespace, may_mount, small_disk
from fakes.wire import Answer, Wire, call, request, sse

PATH = "/v1/chat/completions"
# A name so long that a journal's first segment is full after some thousand records.
MODEL = "relay-" + "x" * 700
PATIENCE = 30.0


@pytest.fixture(params=["serve", "refuse"])
def policy(request: pytest.FixtureRequest) -> str:
    if not may_mount():
        in_namespace(request.node.nodeid)
        pytest.skip("passed in a namespace of its own")
    return str(request.param)


@pytest.fixture
def disk(policy: str, tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path, megabytes=48) as disk:
        yield disk


class Said(NamedTuple):
    """What /ready and /metrics say of the ledger."""

    ready: int
    problem: bool
    up: float
    unrecorded: int


def said(service: Service) -> Said:
    answer, found = call(service.port, request("GET", "/ready")), metrics(service)
    problem = answer.status != 200 or bool(answer.json()["problems"])
    unrecorded = int(found["deepseek_ledger_unrecorded_total"])
    return Said(answer.status, problem, found["deepseek_ledger_up"], unrecorded)


def until(service: Service, ready: int, up: float) -> None:
    def done() -> bool:
        now = said(service)
        return (now.ready, now.problem, now.up) == (ready, up == 0.0, up)

    eventually(done, timeout=PATIENCE, what=f"/ready {ready}, deepseek_ledger_up {up}")


def series(service: Service, count: int) -> list[Answer]:
    with Wire(service.port) as wire:
        data = request("POST", PATH, chat(MODEL, max_tokens=1), service.key)
        return [wire.send(data).answer() for _ in range(count)]


def ids_of(answers: list[Answer]) -> list[str]:
    return [answer.headers["x-request-id"] for answer in answers if answer.status == 200]


def use_up(service: Service) -> list[Answer]:
    """Requests until the first that can't be written down, and some more."""
    answers: list[Answer] = []
    while len(answers) < 20_000:
        answers += series(service, 200)
        if answers[-1].status == 503 or said(service).unrecorded:
            return answers
    raise AssertionError("the journal has no end")


def begin(service: Service) -> tuple[str, Wire]:
    """A stream of which the first chunk is here, and its id."""
    wire = Wire(service.port).send(request("POST", PATH, chat(MODEL, stream=True), service.key))
    status, headers = wire.head()
    assert status == 200
    assert wire.chunk()
    return headers["x-request-id"], wire


def test_a_full_disk_costs_no_record_and_no_stream(policy: str, disk: Path, start, upstream: ChatUpstream):
    config = IMPATIENT + upstream_model(MODEL, upstream) + f'[ledger]\nwhen_unavailable = "{policy}"\n'
    service: Service = start(config, "--workers", "1", data_dir=disk / "data")
    released = asyncio.Event()

    async def long(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("a")))
        await released.wait()
        await peer.send(frame(event("b")) + frame(usage_event()) + frame(DONE) + b"0\r\n\r\n")

    async def endless(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("a")))
        await upstream.leave(peer)

    upstream.play(long)
    streams = dict(begin(service) for _ in range(3))
    upstream.play(endless)
    doomed, _ = begin(service)
    upstream.play(answering_all)
    recorded = [*streams, doomed, *ids_of(series(service, 5))]

    # The database can't grow. The journal has room that was set aside: requests go on whatever the policy is.
    ballast = fill(disk)
    recorded += ids_of(series(service, 50))
    assert len(recorded) == 4 + 5 + 50
    until(service, ready=200, up=0.0)
    assert said(service).unrecorded == 0

    # Now there is no room in the journal either.
    answers = use_up(service)
    unrecorded = said(service).unrecorded
    statuses = {answer.status for answer in answers}
    if policy == "serve":
        assert statuses == {200}
        assert 0 < unrecorded <= 200
        answers = answers[:-unrecorded]
    else:
        assert statuses == {200, 503}
        assert {a.error["code"] for a in answers if a.status == 503} == {"ledger_unavailable"}
        assert unrecorded == 0
    recorded += ids_of(answers)
    declared = 200 if policy == "serve" else 503
    until(service, ready=declared, up=0.0)

    # What runs ends as if nothing were the matter.
    upstream.run(released.set)
    for wire in streams.values():
        assert sse(b"".join(iter(wire.chunk, b"")))[-1] == "[DONE]"
    assert said(service).ready == declared  # by when they are settled

    # A killed worker is replaced on the full disk; its successor can write nothing down.
    [worker] = service.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: service.workers() not in ([], [worker]), timeout=PATIENCE, what="another worker")
    assert [answer.status for answer in series(service, 3)] == [declared] * 3
    until(service, ready=declared, up=0.0)
    if policy == "serve":
        assert said(service).unrecorded == unrecorded + 3

    ballast.unlink()
    until(service, ready=200, up=1.0)
    recorded += ids_of(series(service, 5))
    rows = eventually(lambda: all_of(service, recorded), timeout=PATIENCE, what="all rows")
    assert set(rows) == set(recorded), "nothing else"
    assert len(recorded) == len(set(recorded))
    assert {id for id, row in rows.items() if row["outcome"] != "ok"} == {doomed}
    assert (rows[doomed]["outcome"], rows[doomed]["sent_tokens"]) == ("gateway_lost", 1)
    assert [rows[id]["sent_tokens"] for id in streams] == [3] * 3
    assert service.stop(signal.SIGTERM) == 0
    service.command("ledger", "verify")


def all_of(service: Service, ids: list[str]) -> dict[str, ledger.Row] | None:
    rows = ledger.rows(service)
    return rows if rows.keys() >= set(ids) else None
