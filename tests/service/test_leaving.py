"""When a client leaves, at any point, nobody goes on working for it."""

from __future__ import annotations

import asyncio
import json
import queue
import time
from collections.abc import Callable

import pytest

from fakes.chat_upstream import STREAM_HEAD, ChatUpstream, answering_all, event, frame, holding
from fakes.configs import chat
from fakes.http_server import Peer, Request
from fakes.observe import engine_busy, idle, metrics, waiting
from fakes.service import Service, eventually
from fakes.wire import Wire, call, request

PATH = "/v1/chat/completions"
TRIES = 40  # one in time is enough: this machine has other things to do
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}}  # token 2 would end the answer


def ask(service: Service, body: object, path: str = PATH) -> Wire:
    return Wire(service.port).send(request("POST", path, body, service.key))


WAYS = [Wire.close, Wire.reset]


# Seen by the upstream


def staying(upstream: ChatUpstream, first: bytes) -> Callable[[Peer, Request], object]:
    """Sends `first`, then nothing until the client has left."""

    async def play(peer: Peer, _: Request) -> None:
        if first:
            await peer.send(first)
        await upstream.leave(peer)

    return play


MOMENTS = {
    "before-the-answer": (b"", True),
    "in-the-answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", False),
    "before-the-stream": (b"", True),
    "before-the-first-event": (STREAM_HEAD, True),
    "in-the-stream": (STREAM_HEAD + frame(event("a")), True),
    "in-an-event": (STREAM_HEAD + frame(event("a")[:20]), True),
}


@pytest.mark.parametrize(("first", "stream"), MOMENTS.values(), ids=list(MOMENTS))
@pytest.mark.parametrize("leave", WAYS)
def test_the_upstream_is_let_go_within_50_ms(
    relay: Service, upstream: ChatUpstream, first: bytes, stream: bool, leave: Callable[[Wire], None]
):
    upstream.play(staying(upstream, first))
    times = []
    for _ in range(TRIES):
        wire = ask(relay, chat("relay", stream=stream))
        upstream.request()
        if first.endswith(b"\n\n\r\n"):
            wire.head()
            wire.chunk()
        left = time.monotonic()
        leave(wire)
        times.append(upstream.gone.get(timeout=30) - left)
        if times[-1] < 0.05:
            return
    raise AssertionError(times)


def test_leaving_after_keep_alives(impatient: Service, upstream: ChatUpstream):
    upstream.play(staying(upstream, b""))
    for stream in (True, False):
        wire = ask(impatient, chat("relay", stream=stream))
        wire.head()
        wire.chunk()
        wire.close()
        upstream.gone.get(timeout=30)


def test_leaving_while_queued(relay: Service, upstream: ChatUpstream):
    released = asyncio.Event()
    upstream.play(holding(released))
    busy = [ask(relay, chat("capped")) for _ in range(2)]
    for _ in busy:
        upstream.request()
    queued = [ask(relay, chat("capped", stream=stream)) for stream in (True, False)]
    eventually(lambda: waiting(relay, "capped") == 2, what="two in the queue")
    for wire in queued:
        wire.close()
    eventually(lambda: waiting(relay, "capped") == 0, what="an empty queue")
    last = ask(relay, chat("capped"))
    eventually(lambda: waiting(relay, "capped") == 1, what="one in the queue")
    upstream.run(released.set)
    for wire in (*busy, last):
        assert json.loads(wire.answer().body)["choices"]
        wire.close()
    upstream.request()  # of `last`
    with pytest.raises(queue.Empty):
        upstream.request(timeout=0.1)


def test_leaving_with_another_request_sent_ahead(impatient: Service, upstream: ChatUpstream):
    """The unread second request keeps the end of the connection out of sight; a keep-alive finds out."""
    upstream.play(staying(upstream, STREAM_HEAD + frame(event("a"))))
    wire = ask(impatient, chat("relay", stream=True))
    upstream.request()
    wire.send(request("POST", PATH, chat("relay", "x" * 500_000), impatient.key))
    wire.reset()
    upstream.gone.get(timeout=30)


def test_a_hundred_leave_and_the_pool_is_healthy(relay: Service, upstream: ChatUpstream):
    async def play(peer: Peer, sent: Request) -> None:
        if json.loads(sent.body)["messages"][0]["content"] == "stay":
            await answering_all(peer, sent)
        else:
            await peer.send(STREAM_HEAD + frame(event("a")))
            await upstream.leave(peer)

    upstream.play(play)
    gone = 'deepseek_client_disconnects_total{endpoint="/chat/completions"}'
    before = metrics(relay).get(gone, 0)
    for number in range(100):
        wire = ask(relay, chat("capped", "leave", stream=number % 3 > 0))
        if number % 2:
            upstream.request()
        WAYS[number % 4 // 2](wire)
    eventually(lambda: idle(relay), what="all slots free")
    for _ in range(20):
        assert call(relay.port, request("POST", PATH, chat("capped", "stay"), relay.key)).status == 200
    eventually(lambda: metrics(relay)[gone] > before, what="who left is counted")


# Seen by the embedded engine


def free(service: Service) -> bool:
    return engine_busy(service) == 0


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("leave", WAYS)
def test_the_engines_slot_is_free_within_a_second(
    service: Service, stream: bool, leave: Callable[[Wire], None]
):
    wire = ask(service, chat("tiny", "Count to a thousand.", stream=stream, **LONG))
    eventually(lambda: engine_busy(service) == 1, what="the engine at work")
    leave(wire)
    eventually(lambda: free(service), timeout=5, what="a free slot")
    eventually(lambda: idle(service), timeout=5, what="no lease")


def test_leaving_in_the_prefill_of_a_long_prompt(service: Service):
    in_time = 0
    for attempt in range(40):  # until twice nothing has come yet when it leaves
        content = f"{attempt} " + "one two three four five six seven eight nine " * 200
        wire = ask(service, chat("tiny", content, stream=True))
        eventually(lambda: engine_busy(service) == 1, what="the engine at work")
        in_time += silent(wire)
        wire.close()
        eventually(lambda: free(service), timeout=5, what="a free slot")
        if in_time == 2:
            return
    raise AssertionError("it had always read the prompt by then")


def silent(wire: Wire) -> bool:
    wire.socket.setblocking(False)
    try:
        wire.socket.recv(1)
    except BlockingIOError:
        return True
    return False


def test_all_choices_of_a_request_leave(service: Service):
    wire = ask(service, chat("tiny", n=5, **LONG))
    eventually(lambda: engine_busy(service) == 2, what="both slots at work")
    wire.close()
    eventually(lambda: free(service), timeout=5, what="free slots")
    eventually(lambda: idle(service), timeout=5, what="an empty queue")


def test_leaving_the_engines_queue(service: Service):
    wires = [ask(service, chat("tiny", "Count.", stream=True, **LONG)) for _ in range(5)]
    eventually(lambda: waiting(service, "tiny") == 3, what="three in the queue")
    for wire in reversed(wires):
        wire.close()
    eventually(lambda: free(service), timeout=5, what="free slots")
    eventually(lambda: idle(service), timeout=5, what="an empty queue")


def test_many_leave_the_engine_and_it_answers(service: Service):
    for number in range(40):
        wire = ask(service, chat("tiny", "Count.", stream=number % 2 > 0, **LONG))
        if number % 4:
            time.sleep(0.005 * (number % 7))  # anywhere between the first byte and the first token
        WAYS[number % 3 % 2](wire)
    eventually(lambda: idle(service) and free(service), what="free slots")
    for _ in range(4):
        body = chat("tiny", max_tokens=2)
        assert call(service.port, request("POST", PATH, body, service.key)).status == 200
