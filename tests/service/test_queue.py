"""More work than there is room for, and keys that come and go."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from fakes.chat_upstream import ChatUpstream, answering_all, holding
from fakes.configs import chat, counting
from fakes.http_server import Peer, Request
from fakes.observe import engine_busy, metrics, waiting
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request

PATH = "/v1/chat/completions"
MAX_QUEUE = 6  # as the services here are configured


def post(service: Service, body: object, key: str | None = None) -> Answer:
    return call(service.port, request("POST", PATH, body, key or service.key))


def ask(service: Service, body: object) -> Wire:
    return Wire(service.port).send(request("POST", PATH, body, service.key))


def models(service: Service, key: str) -> Answer:
    """A cheap request that needs a key."""
    return call(service.port, request("GET", "/v1/models", b"", key))


def worker_of(answer: Answer) -> str:
    """Which worker answered: request ids begin with its own prefix."""
    return answer.headers["x-request-id"][:16]


def wire_to_each(service: Service) -> list[Wire]:
    """A connection to each of two workers: which of them gets one is the kernel's choice."""
    wires: dict[str, Wire] = {}
    for _ in range(100):
        wire = Wire(service.port).send(request("GET", "/v1/models", b"", service.key))
        wires.setdefault(worker_of(wire.answer()), wire)
        if len(wires) == 2:
            return list(wires.values())
    raise AssertionError("only one worker answers")


# The queue


def test_requests_are_served_in_order_of_arrival(relay: Service, upstream: ChatUpstream):
    """Two at a time; each is let go only when the test has seen it start."""
    turns = {str(number): asyncio.Event() for number in range(2 + MAX_QUEUE)}

    async def play(peer: Peer, sent: Request) -> None:
        await turns[json.loads(sent.body)["messages"][0]["content"]].wait()
        await answering_all(peer, sent)

    upstream.play(play)
    wires = []
    for number in turns:
        wires.append(ask(relay, chat("capped", number)))
        queued = max(0, int(number) - 1)
        eventually(lambda queued=queued: waiting(relay, "capped") == queued, what=f"{queued} in the queue")
    started = [name_of(upstream.request()) for _ in range(2)]
    for number, wire in enumerate(wires):
        upstream.run(turns[str(number)].set)
        assert wire.answer().status == 200
        wire.close()
        if number + 2 < len(wires):
            started.append(name_of(upstream.request()))
    assert sorted(started[:2]) + started[2:] == list(turns)


def name_of(sent: Request) -> str:
    return str(json.loads(sent.body)["messages"][0]["content"])


def test_a_full_queue_says_when_to_come_back(relay: Service, upstream: ChatUpstream):
    """Retry-After follows from how long requests take: here half a second or more, two at a time."""

    async def play(peer: Peer, sent: Request) -> None:
        await asyncio.sleep(0.5)
        await answering_all(peer, sent)

    def took(_: int) -> float:
        began = time.monotonic()
        assert post(relay, chat("timed")).status == 200
        return time.monotonic() - began

    upstream.play(play)
    with ThreadPoolExecutor(2) as pool:
        longest = max(pool.map(took, range(6)))  # so that the service has learnt it
    released = asyncio.Event()
    upstream.play(holding(released))
    wires = [ask(relay, chat("timed")) for _ in range(2 + MAX_QUEUE)]
    eventually(lambda: waiting(relay, "timed") == MAX_QUEUE, what="a full queue")
    for stream in (True, False):
        answer = post(relay, chat("timed", stream=stream))
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert answer.error["type"] == "rate_limit_error"
        # (6 + 1) x 0.5 s / 2 slots, rounded up; more on a machine that has kept its clients waiting.
        assert 2 <= int(answer.headers["retry-after"]) <= math.ceil(7 * longest / 2)
    upstream.run(released.set)
    assert {wire.answer().status for wire in wires} == {200}
    for wire in wires:
        wire.close()
    assert post(relay, chat("timed")).status == 200


def test_a_full_queue_of_one_model_is_no_concern_of_another(relay: Service, upstream: ChatUpstream):
    released = asyncio.Event()

    async def play(peer: Peer, sent: Request) -> None:
        if name_of(sent) == "wait":
            await released.wait()
        await answering_all(peer, sent)

    upstream.play(play)
    wires = [ask(relay, chat("capped", "wait")) for _ in range(2 + MAX_QUEUE)]
    eventually(lambda: waiting(relay, "capped") == MAX_QUEUE, what="a full queue")
    assert post(relay, chat("relay", "go")).status == 200
    upstream.run(released.set)
    for wire in wires:
        assert wire.answer().status == 200
        wire.close()


def test_two_workers_share_the_slots_of_one_engine(service: Service):
    """Eight requests at once over two slots, to both workers, and the engine never has three."""
    most = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            used = metrics(service)['deepseek_slots{model="tiny",state="used"}']
            most[0] = max(most[0], int(used), engine_busy(service))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        wires = [wire for _ in range(4) for wire in wire_to_each(service)]
        body = counting("tiny", max_tokens=12)
        for wire in wires:
            wire.send(request("POST", PATH, body, service.key))
        answers = [wire.answer() for wire in wires]
    finally:
        done.set()
        watcher.join()
    assert [answer.status for answer in answers] == [200] * 8
    assert len({worker_of(answer) for answer in answers}) == 2
    assert most[0] == 2


def test_the_queue_is_one_for_all_workers(service: Service):
    """With both slots taken the next six wait, whichever worker has them, and the seventh is refused."""
    wires = [ask(service, counting("tiny", stream=True, max_tokens=1500)) for _ in range(2)]
    eventually(lambda: engine_busy(service) == 2, what="both slots at work")
    wires += [ask(service, chat("tiny", "Count.", stream=True, max_tokens=2)) for _ in range(MAX_QUEUE)]
    eventually(lambda: waiting(service, "tiny") == MAX_QUEUE, what="a full queue")
    for _ in range(4):
        answer = post(service, chat("tiny"))
        assert (answer.status, answer.error["code"]) == (429, "queue_full")
        assert int(answer.headers["retry-after"]) >= 1
    for wire in wires[:2]:
        wire.close()
    for wire in wires[2:]:
        assert wire.answer().body.endswith(b"data: [DONE]\n\n")
        wire.close()


# Rates


def test_a_key_has_its_rate_over_all_workers(service: Service):
    key = service.new_key("slow", "--rps", "5")
    began = time.monotonic()
    answers, times = [], []
    while len(answers) < 20 or answers[-1].status == 200:
        answers.append(models(service, key))
        times.append(time.monotonic() - began)
    elapsed = times[-1]
    allowed = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    assert len(allowed) + len(refused) == len(answers)
    assert 5 <= len(allowed) <= 5 + 5 * elapsed + 1
    assert allowed[0].headers["x-ratelimit-limit-requests"] == "5"
    for left, answer, time_ in zip((4, 3, 2), allowed, times, strict=False):
        assert left <= int(answer.headers["x-ratelimit-remaining-requests"]) <= left + int(5 * time_)
    for answer in refused:
        assert answer.error["code"] == "rate_limit_exceeded"
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-ratelimit-limit-requests"] == "5"
        assert answer.headers["x-ratelimit-remaining-requests"] == "0"
        assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    time.sleep(1)  # as Retry-After said
    assert models(service, key).status == 200


def test_one_keys_rate_is_no_concern_of_another(service: Service):
    slow, other = service.new_key("slow", "--rps", "0.01"), service.new_key("other")
    assert [models(service, slow).status for _ in range(3)] == [200, 429, 429]
    assert [models(service, other).status for _ in range(20)] == [200] * 20


# Keys of a running service


def everywhere(service: Service, key: str) -> set[int]:
    """What the key gets, asked until both workers have answered."""
    answers = {}
    for _ in range(100):
        answer = models(service, key)
        answers[worker_of(answer)] = answer.status
        if len(answers) == 2:
            return set(answers.values())
    raise AssertionError("only one worker answers")


def test_a_new_key_works_at_once_everywhere(service: Service):
    for _ in range(3):
        key = service.new_key("fresh")
        assert everywhere(service, key) == {200}


def test_a_disabled_key_stops_at_once_everywhere(service: Service):
    key = service.new_key("switched")
    service.command("keys", "disable", "switched")
    assert everywhere(service, key) == {401}
    assert "disabled" in models(service, key).error["message"]
    service.command("keys", "enable", "switched")
    assert everywhere(service, key) == {200}
    service.command("keys", "delete", "switched")
    assert everywhere(service, key) == {401}


def test_an_open_connection_has_no_older_rights(relay: Service):
    key = relay.new_key("open")
    with Wire(relay.port) as wire:
        assert wire.send(request("GET", "/v1/models", b"", key)).answer().status == 200
        relay.command("keys", "delete", "open")
        assert wire.send(request("GET", "/v1/models", b"", key)).answer().status == 401


def test_a_metrics_key_reads_metrics_only(relay: Service):
    key = relay.new_key("watcher", "--role", "metrics")
    assert call(relay.port, request("GET", "/metrics", b"", key)).status == 200
    assert models(relay, key).status == 403
    assert post(relay, chat("relay"), key).status == 403
    assert call(relay.port, request("GET", "/metrics", b"", relay.new_key("user"))).status == 403
