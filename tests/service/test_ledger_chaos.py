"""kill -9 at random moments, under several streams: no request is lost or written down twice.

LEDGER_CHAOS_MOMENTS says how often (10); `make ledger-chaos` does it 200 times. LEDGER_CHAOS_SEED repeats the
moments of a run.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import statistics
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

from fakes import ledger
from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame
from fakes.configs import ENGINE, PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request
from fakes.ledger import Row
from fakes.service import Service, eventually
from fakes.wire import Wire, request

MOMENTS = int(os.environ.get("LEDGER_CHAOS_MOMENTS", "10"))
SEED = int(os.environ.get("LEDGER_CHAOS_SEED", "0")) or random.randrange(1, 10**6)
PATH = "/v1/chat/completions"
RELAYS = 4
TOKENS, PAUSE = 60, 0.005  # of each relayed stream
WHOLE = {"relay": TOKENS, "tiny": 16}  # tokens of an answer that is complete
MOST_UNSENT = 1024 * 1024  # bytes of an answer that a worker keeps while its client does not read
ONE_WRITE = 8  # tokens; nearly always one, more if the worker or its upstream was kept from running
MADE_AHEAD = 200  # more than any model here makes in a second


class Received(NamedTuple):
    """What one client got before its connection ended; tokens in whole events."""

    id: str
    model: str
    tokens: int
    complete: bool


async def paced(peer: Peer, _: Request) -> None:
    await peer.send(STREAM_HEAD)
    for _ in range(TOKENS):
        await peer.send(frame(event("a")))
        await asyncio.sleep(PAUSE)
    await peer.send(frame(DONE) + b"0\r\n\r\n")


BODIES: list[dict[str, Any]] = [
    *[chat("relay", stream=True)] * RELAYS,
    *[chat("tiny", "Count.", stream=True, max_tokens=WHOLE["tiny"], logit_bias={"2": -100}, logprobs=True)]
    * 2,
]


def client(port: int, key: str, body: dict[str, Any]) -> Received | None:
    """Read a stream to its end, whatever that is; None if there was not one byte of it."""
    data = b""
    with suppress(ConnectionError), Wire(port) as wire:
        # HTTP/1.0: the body comes as it is, without the lengths of chunks.
        wire.send(request("POST", PATH, body, key, version="1.0"))
        with suppress(ConnectionError):
            while piece := wire.socket.recv(65536):
                data += piece
    head, end, rest = data.partition(b"\r\n\r\n")
    if not end:
        return None
    assert head.startswith(b"HTTP/1.1 200"), head
    id = next(line[14:] for line in head.decode().split("\r\n") if line.startswith("x-request-id: "))
    events = [block[6:] for block in rest.split(b"\n\n")[:-1] if block.startswith(b"data: ")]
    complete = events[-1:] == [b"[DONE]"]
    return Received(id, body["model"], sum(map(tokens_of, events[: -1 if complete else None])), complete)


def tokens_of(data: bytes) -> int:
    [choice] = json.loads(data)["choices"]
    if choice["delta"].get("content") == "a" and "logprobs" not in choice:
        return 1
    return len((choice.get("logprobs") or {}).get("content") or ())


def test_nothing_is_lost_or_counted_twice(start, upstream: ChatUpstream):
    upstream.play(paced)
    config = PATIENT + ENGINE + upstream_model("relay", upstream)
    service: Service = start(config, "--workers", "2")
    key, data_dir = service.key, service.data_dir
    assert key is not None
    dice = random.Random(SEED)
    print(f"seed {SEED}")
    received: list[Received] = []
    differences: list[tuple[int, int]] = []
    with ThreadPoolExecutor(len(BODIES)) as pool:
        for _ in range(MOMENTS):
            clients = [pool.submit(client, service.port, key, body) for body in BODIES]
            time.sleep(dice.uniform(0.01, 0.5))
            if dice.random() < 0.3:
                service.kill()
                service = start(config, "--workers", "2", data_dir=data_dir)
            else:
                workers = service.workers()
                os.kill(dice.choice(workers), signal.SIGKILL)
                eventually(partial(fresh, service, workers), timeout=60, what="a new worker")
            now = results(clients)
            rows = wait_for(service, now)
            differences += [check(one, rows[one.id]) for one in now]
            received += now
    assert len(received) > MOMENTS, "the clients get answers at all"
    assert statistics.median(sent for sent, _ in differences) <= ONE_WRITE
    assert len(ledger.rows(service)) >= len(received)
    assert len({one.id for one in received}) == len(received)
    assert service.stop(signal.SIGTERM) == 0
    service.command("ledger", "verify")
    lost = [one for one in differences if one[0] or one[1]]
    print(f"{len(received)} requests; (sent - received, made - received) of those that differ: {lost}")


def fresh(service: Service, before: list[int]) -> bool:
    now = service.workers()
    return len(now) == 2 and now != before


def results(clients: list[Future[Received | None]]) -> list[Received]:
    return [found for one in clients if (found := one.result(timeout=60)) is not None]


def wait_for(service: Service, those: list[Received]) -> dict[str, Row]:
    def found() -> dict[str, Row] | None:
        rows = ledger.rows(service)
        return rows if all(one.id in rows for one in those) else None

    return dict(eventually(found, timeout=60, what="a row of each request that was admitted"))


def check(one: Received, row: Row) -> tuple[int, int]:
    """How many tokens more were sent, and made, than the client received."""
    assert row["model"] == one.model
    sent, made = row["sent_tokens"] - one.tokens, row["completion_tokens"] - one.tokens
    if row["outcome"] == "ok":
        # An answer is settled with its last write, which leaves the process a moment later.
        assert one.complete or (row["completion_tokens"] == WHOLE[one.model] and sent <= ONE_WRITE), (
            one,
            row,
        )
    else:
        assert (row["outcome"], one.complete) == ("gateway_lost", False), (one, row)
    if one.complete:
        assert (sent, made) == (0, 0), (one, row)
    # Nothing is received that is not counted; the write of that very moment may be counted and not received.
    assert 0 <= sent <= TOKENS, (one, row)
    assert 0 <= made <= MADE_AHEAD, (one, row)
    return sent, made


def test_what_a_slow_reader_had_not_read_yet(start, upstream: ChatUpstream):
    """Its worker dies: what waited in the worker's own buffer counts as sent, and that is little."""
    part = event("a" * 100)
    out = [0]

    async def flood(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD)
        while not peer.writer.is_closing():
            await peer.send(frame(part * 5))
            out[0] += 1

    def settled() -> bool:
        before = out[0]
        time.sleep(0.5)
        return out[0] == before > 0

    upstream.play(flood)
    service: Service = start(PATIENT + upstream_model("relay", upstream), "--workers", "1")
    with Wire(service.port) as wire:
        wire.send(request("POST", PATH, chat("relay", stream=True), service.key))
        _, headers = wire.head()
        eventually(settled, timeout=60, what="all buffers full")
        [worker] = service.workers()
        os.kill(worker, signal.SIGKILL)
        body = b""
        with suppress(ConnectionError):
            for chunk in iter(wire.chunk, b""):
                body += chunk
    row = ledger.row(service, headers["x-request-id"])
    received = body.count(b"\n\n")
    assert received > 1000, "more than fits into the worker's buffer"
    assert received <= row["completion_tokens"]
    assert 0 <= row["sent_tokens"] - received <= MOST_UNSENT // len(part)
