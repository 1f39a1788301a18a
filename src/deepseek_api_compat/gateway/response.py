"""Answering one request: whole answers, and streams whose headers wait for the first event."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import MutableMapping
from typing import Any, Protocol

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from deepseek_api_compat.errors import ApiError, MethodNotAllowed
from deepseek_api_compat.gateway.limits import Allowance

Headers = list[bytes]  # whole lines, each with its line end

# Browsers take an answer for what it says it is, not for what it looks like: prompts are anyone's text.
NOSNIFF = b"x-content-type-options: nosniff\r\n"
JSON = b"content-type: application/json\r\n" + NOSNIFF
SSE = (
    b"content-type: text/event-stream; charset=utf-8\r\ncache-control: no-cache\r\nx-accel-buffering: no\r\n"
    + NOSNIFF
)
RATE_OF_REQUESTS, RATE_OF_TOKENS = (
    b"x-ratelimit-limit-%b: %%d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%.3fs\r\n"
    % (kind, kind, kind)
    for kind in (b"requests", b"tokens")
)
# Every page for people: nothing but its own files runs in it, nobody frames it, and it tells no other site of
# itself.
PAGE = (
    b"content-type: text/html; charset=utf-8\r\n"
    b"content-security-policy: default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
    b" font-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'\r\n"
    b"x-frame-options: DENY\r\n"
    b"referrer-policy: no-referrer\r\n"
    b"cross-origin-opener-policy: same-origin\r\n"
    b"cross-origin-resource-policy: same-origin\r\n"
    b"permissions-policy: camera=(), geolocation=(), microphone=()\r\n"
    b"cache-control: no-store\r\n" + NOSNIFF
)


class Responder:
    """Writes one response to its connection, each step with a single write.

    uvicorn's own `send` writes head and body apart, two packets for every answer; what it keeps in its
    request cycle (state, keep-alive, flow control) is used and kept true here.
    """

    __slots__ = ("_chunked", "_cycle", "_no_body")

    def __init__(self, scope: MutableMapping[str, Any]) -> None:
        self._cycle = scope["cycle"]
        self._chunked = scope["http_version"] == "1.1"
        self._no_body = scope["method"] == "HEAD"

    @property
    def started(self) -> bool:
        return bool(self._cycle.response_started)

    @property
    def complete(self) -> bool:
        return bool(self._cycle.response_complete)

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """A complete response."""
        length = b"content-length: %d\r\n\r\n" % len(body)
        self._write(self._head(status, headers) + length + (b"" if self._no_body else body))
        self._complete()
        await self._drained()

    async def begin(self, status: int, headers: Headers, data: bytes) -> None:
        """The head and the first part of a response of unknown length."""
        coding = b"transfer-encoding: chunked\r\n\r\n" if self._chunked else b"\r\n"
        if not self._chunked:
            self._cycle.keep_alive = False  # HTTP/1.0: the end of the connection ends the body
        self._write(self._head(status, headers) + coding + self._frame(data))
        await self._drained()

    async def part(self, data: bytes) -> None:
        """More of it. Waits while the client reads slower than we write."""
        self._write(self._frame(data))
        if self._cycle.flow.write_paused:
            await self._drained()

    async def end(self, data: bytes) -> None:
        """The last part, which may be empty."""
        last = b"0\r\n\r\n" if self._chunked and not self._no_body else b""
        self._write(self._frame(data) + last)
        self._complete()
        await self._drained()

    def close_afterwards(self) -> None:
        """Don't keep the connection for another request."""
        self._cycle.keep_alive = False

    def abort(self) -> None:
        """Break off: the client sees an incomplete response."""
        self._cycle.transport.close()

    def _head(self, status: int, headers: Headers) -> bytes:
        cycle = self._cycle
        cycle.response_started = True
        cycle.waiting_for_100_continue = False
        lines = [STATUS_LINE[status]]
        for name, value in cycle.default_headers:
            lines += (name, b": ", value, b"\r\n")
        lines += headers
        if not cycle.keep_alive:
            lines.append(b"connection: close\r\n")
        return b"".join(lines)

    def _frame(self, data: bytes) -> bytes:
        if self._no_body or not data:
            return b""
        return b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data

    def _write(self, data: bytes) -> None:
        if data and not self._cycle.disconnected:
            self._cycle.transport.write(data)

    async def _drained(self) -> None:
        if self._cycle.flow.write_paused:
            await self._cycle.flow.drain()

    def _complete(self) -> None:
        cycle = self._cycle
        cycle.response_complete = True
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()


async def send_json(out: Responder, status: int, value: object, headers: Headers) -> None:
    await out.whole(status, [*headers, JSON], msgspec.json.encode(value))


async def send_error(out: Responder, error: ApiError, headers: Headers) -> None:
    extra = list(headers)
    if error.retry_after is not None:
        extra.append(b"retry-after: %d\r\n" % max(1, math.ceil(error.retry_after)))
    if error.status == 401:
        extra.append(b"www-authenticate: Bearer\r\n")
    if isinstance(error, MethodNotAllowed):
        extra.append(b"allow: %b\r\n" % ", ".join(error.allowed).encode())
    await send_json(out, error.status, error.body(), extra)


def rate_headers(requests: Allowance | None, tokens: Allowance | None) -> Headers:
    """`x-ratelimit-{limit,remaining,reset}-{requests,tokens}`, of the limits there are."""
    headers = []
    if requests is not None:
        headers.append(RATE_OF_REQUESTS % (requests.limit, requests.remaining, requests.reset))
    if tokens is not None:
        headers.append(RATE_OF_TOKENS % (tokens.limit, tokens.remaining, tokens.reset))
    return headers


class Pulse:
    """The keep-alives of all open streams of a worker: one clock, so that no request sets a timer.

    first: seconds of silence after which the headers of a response go out with a first keep-alive.
    interval: seconds of silence before each further one. Both hold to within an eighth.
    """

    def __init__(self, first: float, interval: float) -> None:
        self.first = first
        self.interval = interval
        self.streams: set[EventStream] = set()

    async def run(self) -> None:
        """Runs for as long as the worker does."""
        step = min(1.0, self.first / 8, self.interval / 8)
        while True:
            await asyncio.sleep(step)
            now = time.monotonic()
            for stream in list(self.streams):
                stream.tick(now)


class Sink(Protocol):
    """Where an answer goes, part by part or whole."""

    written: bool

    async def write(self, data: bytes) -> None: ...
    async def finish(self, data: bytes) -> None: ...


class EventStream:
    """A response that may take long to begin.

    Nothing is sent until the first `write` or `finish`; an ApiError before that is an ordinary HTTP
    error. After `pulse.first` seconds of silence the headers go out with status 200, and whenever
    `pulse.interval` seconds pass in silence, one keep-alive: a comment in a stream, a blank line in JSON.
    A late error is then an SSE error event, or an error object as the body.
    """

    def __init__(self, out: Responder, headers: Headers, pulse: Pulse, *, sse: bool, now: float) -> None:
        """`now`: time.monotonic() at the arrival of the request."""
        self._out = out
        self._headers = headers
        self._pulse = pulse
        self._sse = sse
        self.status = 200
        self.written = False  # some of the body, keep-alives not counted
        self._quiet_since = now
        self._wrote = False
        self._beat: asyncio.Task[None] | None = None
        pulse.streams.add(self)

    async def write(self, data: bytes) -> None:
        """Send part of the body; waits while the client reads slower than we write."""
        self._wrote = self.written = True
        if self._out.started:
            await self._out.part(data)
        else:
            await self._begin(data)

    async def finish(self, data: bytes) -> None:
        """Send the last part of the body."""
        self.close()
        if self._out.started:
            await self._out.end(data)
        elif self._sse:
            await self._begin(data)
            await self._out.end(b"")
        else:
            await self._out.whole(200, [*self._headers, JSON], data)

    async def fail(self, error: ApiError) -> None:
        """Report an error in the way that is still possible."""
        self.close()
        self.status = error.status
        if not self._out.started:
            await send_error(self._out, error, self._headers)
            return
        body = msgspec.json.encode(error.body())
        await self._out.end(b"data: " + body + b"\n\n" if self._sse else body)

    def close(self) -> None:
        """No more keep-alives. Called on every way out."""
        self._pulse.streams.discard(self)
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    def tick(self, now: float) -> None:
        """Send a keep-alive if it is time."""
        if self._wrote:
            self._wrote = False
            self._quiet_since = now
        patience = self._pulse.interval if self._out.started else self._pulse.first
        if now - self._quiet_since >= patience and (self._beat is None or self._beat.done()):
            self._quiet_since = now
            self._beat = asyncio.get_running_loop().create_task(self._send_beat())

    async def _begin(self, data: bytes) -> None:
        await self._out.begin(200, [*self._headers, SSE if self._sse else JSON], data)

    async def _send_beat(self) -> None:
        beat = b": keep-alive\n\n" if self._sse else b"\n"
        if self._out.started:
            await self._out.part(beat)
        else:
            await self._begin(beat)
