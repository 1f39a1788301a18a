"""An OpenAI-compatible upstream in a thread, which behaves as the test that runs says.

    upstream.play(streaming("a", "b"))      from now on, each POST is answered by this
    request = upstream.request()            what it was sent

Health checks (any GET) are answered with `upstream.health`, a status.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import queue
import threading
import time
from collections.abc import Awaitable, Callable

from fakes.http_server import HttpServer, Peer, Request, chunked, ok

Play = Callable[[Peer, Request], Awaitable[None]]

USAGE = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class ChatUpstream:
    """Starts at once. gone: the time.monotonic() of each client that left while it was being answered."""

    def __init__(self) -> None:
        self.health = 200
        self.gone: queue.Queue[float] = queue.Queue()
        self._requests: queue.Queue[Request] = queue.Queue()
        self._play: Play = answering_all
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))
        self._thread.start()
        self._listening.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def play(self, play: Play) -> None:
        """Answer so from now on; what was recorded before is forgotten."""
        self._play = play
        for past in (self.gone, self._requests):
            while not past.empty():
                past.get()

    def request(self, timeout: float = 10.0) -> Request:
        """The next POST that arrived."""
        return self._requests.get(timeout=timeout)

    def run(self, function: Callable[[], None]) -> None:
        """Call it in the upstream's event loop, where an event of a play may be set."""
        self._loop.call_soon_threadsafe(function)

    def close(self) -> None:
        self.run(self._closing.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        async with HttpServer(self._serve) as server:
            self.port = server.endpoint.port
            self._listening.set()
            await self._closing.wait()

    async def _serve(self, peer: Peer) -> None:
        while request := await peer.request():
            if request.method == "GET":
                await peer.send(ok(b'{"data": []}', status=f"{self.health} Status"))
                continue
            self._requests.put(request)
            with contextlib.suppress(ConnectionError):
                await self._play(peer, request)
            if peer.writer.is_closing():
                return

    async def leave(self, peer: Peer) -> None:
        """Wait until the client has closed, and note when."""
        await peer.closed()
        self.gone.put(time.monotonic())
        peer.reset()


def event(text: str) -> bytes:
    """One chunk of an answer, as an event."""
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def usage_event() -> bytes:
    return b"data: " + json.dumps({"id": "x", "choices": [], "usage": USAGE}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def frame(data: bytes) -> bytes:
    """One chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def streaming(*parts: bytes, end: bool = True) -> Play:
    """A chunked answer of these parts; without `end` the connection breaks off after them."""

    async def play(peer: Peer, request: Request) -> None:
        await peer.send(chunked(*parts, end=end))
        if not end:
            peer.writer.close()

    return play


def one_by_one(*parts: bytes, pause: float = 0.01) -> Play:
    """As `streaming`, with a pause after each part, so that each is a read of its own."""

    async def play(peer: Peer, request: Request) -> None:
        await peer.send(STREAM_HEAD)
        for part in parts:
            await peer.send(frame(part))
            await asyncio.sleep(pause)
        await peer.send(b"0\r\n\r\n")

    return play


def replying(response: bytes) -> Play:
    async def play(peer: Peer, request: Request) -> None:
        await peer.send(response)

    return play


ANSWER = json.dumps(
    {"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": {}}], "usage": USAGE}
).encode()


async def answering_all(peer: Peer, request: Request) -> None:
    """What a healthy upstream does."""
    if json.loads(request.body).get("stream"):
        await peer.send(chunked(event("hello"), usage_event(), DONE))
    else:
        await peer.send(ok(ANSWER))


def holding(released: asyncio.Event) -> Play:
    """Answers as a healthy one does, but not before the event is set."""

    async def play(peer: Peer, request: Request) -> None:
        await released.wait()
        await answering_all(peer, request)

    return play
