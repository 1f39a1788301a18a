"""Streams are what OpenAI's clients expect, cost little, and don't get in each other's way."""

from __future__ import annotations

import asyncio
import json
import statistics
import threading
import time

import pytest

from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame, holding, usage_event
from fakes.configs import chat, counting
from fakes.http_server import Peer, Request
from fakes.observe import engine_busy, memory, waiting
from fakes.service import Service, eventually
from fakes.wire import Wire, call, request, sse, text_of

PATH = "/v1/chat/completions"
MEGABYTE = 1024 * 1024


def ask(service: Service, body: object, path: str = PATH) -> Wire:
    """A connection on which `body` was posted."""
    return Wire(service.port).send(request("POST", path, body, service.key))


# What a stream looks like


def test_a_stream_and_an_answer_say_the_same(service: Service):
    question = counting("tiny", max_tokens=24)
    whole = call(service.port, request("POST", PATH, question, service.key)).json()
    question |= {"stream": True, "stream_options": {"include_usage": True}}
    with ask(service, question) as wire:
        answer = wire.answer()
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    assert "content-length" not in answer.headers

    *chunks, done = sse(answer.body)
    assert done == "[DONE]"
    first, *middle, last, usage = map(json.loads, chunks)
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"][0]["delta"] == {"content": ""}
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert usage["choices"] == []
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in map(json.loads, chunks)}) == 1

    assert text_of(answer.body) == whole["choices"][0]["message"]["content"]
    for kind in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert usage["usage"][kind] == whole["usage"][kind]


def test_several_choices_come_interleaved(service: Service):
    with ask(service, chat("tiny", n=3, stream=True, max_tokens=8, temperature=1.0)) as wire:
        *chunks, done = sse(wire.answer().body)
    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert done == "[DONE]"
    assert {choice["index"] for choice in choices} == {0, 1, 2}
    assert sum(choice["finish_reason"] is not None for choice in choices) == 3


def test_a_legacy_stream(service: Service):
    body = {"model": "tiny", "prompt": "Once upon", "stream": True, "max_tokens": 8}
    with ask(service, body, "/v1/completions") as wire:
        *chunks, done = sse(wire.answer().body)
    assert done == "[DONE]"
    assert all(json.loads(chunk)["object"] == "text_completion" for chunk in chunks)
    assert "".join(json.loads(chunk)["choices"][0]["text"] for chunk in chunks)


def test_the_connection_is_good_for_the_next_request(service: Service):
    with ask(service, chat("tiny", stream=True, max_tokens=2)) as wire:
        wire.answer()
        assert wire.send(request("GET", "/health")).answer().status == 200


def test_tokens_come_as_they_are_made(service: Service):
    """Twenty times something comes, and the engine is still writing: there are over a thousand to come."""
    with ask(service, counting("tiny", stream=True, max_tokens=1500)) as wire:
        wire.head()
        for _ in range(20):
            assert wire.chunk()
        assert engine_busy(service) == 1


def test_one_write_for_one_read(relay: Service, upstream: ChatUpstream):
    """Each read of the gateway holds what the upstream has sent since; it goes out in one piece."""
    groups = [b"".join(event(f"{i}-{j}") for j in range(i + 1)) for i in range(8)]
    read = threading.Semaphore(0)

    async def play(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD)
        for group in groups:
            await peer.send(frame(group))
            await asyncio.to_thread(read.acquire, timeout=60)
        await peer.send(frame(usage_event() + DONE) + b"0\r\n\r\n")

    upstream.play(play)
    with ask(relay, chat("relay", stream=True)) as wire:
        wire.head()
        for group in groups:
            assert wire.chunk() == group
            read.release()
        assert wire.chunk() == DONE
        assert wire.chunk() == b""


# While there is nothing to say


def test_the_queued_are_kept_alive(impatient: Service, upstream: ChatUpstream):
    released = asyncio.Event()
    upstream.play(holding(released))
    streamed, whole = (chat("capped", stream=stream) for stream in (True, False))
    wires = [ask(impatient, streamed) for _ in range(2)]
    for _ in wires:
        upstream.request()
    wires += [ask(impatient, streamed), ask(impatient, whole)]
    eventually(lambda: waiting(impatient, "capped") == 2, what="two in the queue")
    for wire in wires[:3]:
        assert wire.head()[0] == 200
        for _ in range(3):
            assert wire.chunk() == b": keep-alive\n\n"
    assert wires[3].head()[0] == 200
    for _ in range(3):
        assert wires[3].chunk() == b"\n"
    upstream.run(released.set)
    for wire in wires[:3]:
        assert text_of(b"".join(iter(wire.chunk, b""))) == "hello"
    assert json.loads(b"".join(iter(wires[3].chunk, b"")))["choices"]


def test_no_keep_alive_inside_an_event(impatient: Service, upstream: ChatUpstream):
    """The upstream stops in the middle of an event until the client has seen a keep-alive."""
    seen = asyncio.Event()

    async def play(peer: Peer, _: Request) -> None:
        whole = event("x" * 100)
        await peer.send(STREAM_HEAD + frame(event("a") + whole[:50]))
        await seen.wait()
        await peer.send(frame(whole[50:] + DONE) + b"0\r\n\r\n")

    upstream.play(play)
    with ask(impatient, chat("relay", stream=True)) as wire:
        wire.head()
        body = b""
        while b": keep-alive" not in body:
            body += wire.chunk()
        upstream.run(seen.set)
        body += b"".join(iter(wire.chunk, b""))
    assert text_of(body) == "a" + "x" * 100


# Slow and fast readers


class Flood:
    """An upstream's play: events without end, as fast as they are taken. sent: bytes so far."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, peer: Peer, _: Request) -> None:
        data = frame(event("x" * 100) * 250)
        await peer.send(STREAM_HEAD)
        while True:
            await peer.send(data)
            self.sent += len(data)


def settled(flood: Flood) -> bool:
    """Whether nothing more went out for half a second."""
    before = flood.sent
    time.sleep(0.5)
    return flood.sent == before > 0


def test_a_slow_reader_costs_little(relay: Service, upstream: ChatUpstream):
    [worker] = relay.workers()
    flood = Flood()
    upstream.play(flood)
    before = memory(worker)
    wires = []
    for _ in range(4):
        wires.append(ask(relay, chat("relay", stream=True)))
        wires[-1].head()
    eventually(lambda: settled(flood), timeout=60, what="the flood held back")
    assert memory(worker) - before < len(wires) * 10 * MEGABYTE
    for wire in wires:
        wire.reset()


def test_a_slow_reader_gets_everything(relay: Service, upstream: ChatUpstream):
    texts = [f"{i:05}" * 200 for i in range(5000)]  # 5 MB

    async def play(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD)
        for text in texts:
            await peer.send(frame(event(text)))
        await peer.send(frame(DONE) + b"0\r\n\r\n")

    upstream.play(play)
    with ask(relay, chat("relay", stream=True)) as wire:
        wire.head()
        time.sleep(1)
        assert text_of(b"".join(iter(wire.chunk, b""))) == "".join(texts)


def test_a_flat_out_stream_does_not_delay_the_others(relay: Service, upstream: ChatUpstream):
    flood = Flood()
    upstream.play(flood)
    done = threading.Event()

    def drink(wire: Wire) -> None:
        while not done.is_set():
            wire.socket.recv(MEGABYTE)

    with ask(relay, chat("relay", stream=True)) as greedy:
        drinker = threading.Thread(target=drink, args=(greedy,))
        drinker.start()
        try:
            eventually(lambda: flood.sent > MEGABYTE)
            before = flood.sent
            times = []
            with Wire(relay.port) as other:
                for _ in range(50):
                    began = time.monotonic()
                    other.send(request("GET", "/v1/models", b"", relay.key)).answer()
                    times.append(time.monotonic() - began)
            assert flood.sent - before > MEGABYTE / 4, "nothing else was going on"
        finally:
            done.set()
            drinker.join()
    assert statistics.median(times) < 1, "a flood without end would take for ever"


@pytest.mark.parametrize("streams", [20])
def test_many_streams_at_once(relay: Service, upstream: ChatUpstream, streams: int):
    async def play(peer: Peer, sent: Request) -> None:
        name = json.loads(sent.body)["messages"][0]["content"]
        await peer.send(STREAM_HEAD)
        for i in range(20):
            await peer.send(frame(event(f"{name}:{i} ")))
            await asyncio.sleep(0.01)
        await peer.send(frame(DONE) + b"0\r\n\r\n")

    upstream.play(play)
    wires = [ask(relay, chat("relay", f"s{number}", stream=True)) for number in range(streams)]
    for number, wire in enumerate(wires):
        assert text_of(wire.answer().body) == "".join(f"s{number}:{i} " for i in range(20))
        wire.close()
