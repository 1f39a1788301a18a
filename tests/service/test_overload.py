"""One key, many more requests than it may pay for, over all workers of a machine."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from fakes import ledger
from fakes.chat_upstream import STREAM_HEAD, ChatUpstream, event, frame
from fakes.configs import IMPATIENT, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.service import Service, eventually
from fakes.wire import Wire, call, request

PATH = "/v1/chat/completions"
UNIT = 1_000_000  # micro-units: the price of one token of an answer
MOST = 20  # tokens that an answer may have, and that are reserved for it
LONGEST = 35  # tokens of an answer whose length nobody has limited, and for which MOST are reserved
WORKERS, CLIENTS = 3, 24
CONFIG = f'reserved_completion_tokens = {MOST}\n[[prices]]\nmodel = "relay"\nprompt = 0\ncached = 0\n'


@pytest.fixture(scope="module")
def shared(start, chat_upstream: ChatUpstream) -> Service:
    config = IMPATIENT + CONFIG + f"completion = {UNIT}\n" + upstream_model("relay", chat_upstream)
    return start(config, "--workers", str(WORKERS))


@pytest.fixture
def service(shared: Service, upstream: ChatUpstream) -> Service:
    return shared


async def answering(peer: Peer, request: Request) -> None:
    """An answer of any length up to what was asked for, after a while of any length."""
    completion = random.randint(0, json.loads(request.body).get("max_tokens", LONGEST))
    await asyncio.sleep(random.uniform(0, 0.03))
    usage = {"prompt_tokens": 1, "completion_tokens": completion, "total_tokens": 1 + completion}
    body = {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {}}], "usage": usage}
    await peer.send(ok(json.dumps(body).encode()))


def asked(service: Service, key: str, times: int, **more: Any) -> int:
    """How many of so many requests, one after the other on one connection, were admitted."""
    with Wire(service.port) as wire:
        data = request("POST", PATH, chat("relay", **more), key)
        statuses = [wire.send(data).answer().status for _ in range(times)]
    assert set(statuses) <= {200, 402, 429}
    return statuses.count(200)


def flood(service: Service, keys: list[str], times: int, **more: Any) -> list[int]:
    """How many requests of each key were admitted, of CLIENTS clients at once."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        mine = [keys[number % len(keys)] for number in range(CLIENTS)]
        counts = list(pool.map(lambda key: asked(service, key, times, **more), mine))
    return [sum(counts[number :: len(keys)]) for number in range(len(keys))]


def asked_to_the_end(service: Service, key: str, **more: Any) -> int:
    """How many more are admitted one after the other, until nothing is left."""
    admitted = refused = 0
    while refused < 5:  # what was used is counted a moment after the answer
        now = asked(service, key, 1, **more)
        admitted, refused = admitted + now, 0 if now else refused + 1
        time.sleep(0 if now else 0.05)
    return admitted


def used(service: Service, name: str, admitted: int) -> tuple[int, int]:
    """Money and tokens of all requests of a key, once they are written down."""
    rows = ledger.rows_of_key(service, name, admitted)
    assert len(rows) == admitted
    return sum(row["price"] for row in rows), sum(
        row["prompt_tokens"] + row["completion_tokens"] for row in rows
    )


def test_ten_times_what_a_key_may_use_is_never_more_and_never_less(service: Service, upstream: ChatUpstream):
    upstream.play(answering)
    budget, daily = 400 * UNIT, 500
    keys = [service.new_key("poor", "--budget", "400"), service.new_key("daily", "--tpd", str(daily))]
    data = request("POST", PATH, chat("relay", max_tokens=MOST), keys[1])
    first = call(service.port, data)
    reserved = daily - int(first.headers["x-ratelimit-remaining-tokens"])  # with an estimate of the prompt
    assert MOST < reserved < 4 * MOST
    # About ten tokens each, so some forty fit.
    admitted = flood(service, keys, 420 // (CLIENTS // 2), max_tokens=MOST)
    assert all(count < 100 for count in admitted), admitted
    # What was reserved and not used has come back: the rest can be spent to the last reservation.
    for number, key in enumerate(keys):
        admitted[number] += asked_to_the_end(service, key, max_tokens=MOST)
    money, _ = used(service, "poor", admitted[0])
    assert budget - MOST * UNIT < money <= budget
    _, tokens = used(service, "daily", admitted[1] + 1)
    assert daily - reserved < tokens <= daily
    print(
        f"{admitted} admitted; {money / UNIT:g} of 400 spent; {tokens} of {daily} used, {reserved} reserved"
    )


def test_answers_longer_than_guessed_overdraw_by_no_more_than_what_is_under_way(
    service: Service, upstream: ChatUpstream
):
    upstream.play(answering)
    key = service.new_key("overdrawn", "--budget", "200")
    [admitted] = flood(service, [key], 10)
    admitted += asked_to_the_end(service, key)
    money, _ = used(service, "overdrawn", admitted)
    # Each was admitted when there was room for MOST.
    assert (200 - MOST) * UNIT < money <= 200 * UNIT + CLIENTS * (LONGEST - MOST) * UNIT
    print(f"{admitted} admitted; {money / UNIT:g} of 200 spent")


def connected(service: Service, count: int) -> list[Wire]:
    """So many connections, each of them taken by a worker."""
    wires = [Wire(service.port) for _ in range(count)]
    assert {wire.send(request("GET", "/health")).answer().status for wire in wires} == {200}
    return wires


def begun(wires: list[Wire], data: bytes) -> Wire | None:
    """A stream on one of the connections, taken from them; None if it is refused."""
    while wires:
        wire = wires.pop()
        try:
            status, headers = wire.send(data).head()
            if status == 200:
                assert wire.chunk()
                return wire
            wire.body(headers)
        except ConnectionError:  # its worker was just killed
            continue
        wires.append(wire)
        return None
    raise AssertionError("no connection is left")


def test_a_killed_worker_s_reservations_are_there_for_the_others(service: Service, upstream: ChatUpstream):
    async def endless(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("a")))
        await upstream.leave(peer)

    upstream.play(endless)
    count = 12
    # Room for the one token that each of them has used by then.
    budget = count * MOST + count
    key = service.new_key("unlucky", "--budget", str(budget))
    data = request("POST", PATH, chat("relay", stream=True, max_tokens=MOST), key)
    streams = [begun(connected(service, 1), data) for _ in range(count)]
    assert all(streams)
    spare = connected(service, 4 * count)
    assert begun(spare, data) is None, "all is reserved"
    again: list[Wire] = []
    for worker in service.workers():
        os.kill(worker, signal.SIGKILL)
        killed = time.monotonic()
        while not again and time.monotonic() < killed + 5:
            again += filter(None, [begun(spare, data)])
        if again:  # else it had none of the streams
            break
    print(f"{(time.monotonic() - killed) * 1000:.0f} ms until what was reserved was there again")
    while wire := begun(spare, data):
        again.append(wire)
    Wire.close_all()
    rows = ledger.rows_of_key(service, "unlucky", count + len(again))
    lost = [row["outcome"] for row in rows].count("gateway_lost")
    assert lost == len(again) > 0, "as many as were lost, and not one more"
    assert sum(row["price"] for row in rows) == (count + len(again)) * UNIT
    eventually(lambda: len(service.workers()) == WORKERS, what="another worker")
