"""Answering one ASGI request: whole answers, and streams whose headers wait for the first event."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import msgspec

from deepseek_api_compat.errors import ApiError, MethodNotAllowed

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON = (b"content-type", b"application/json")
SSE = (b"content-type", b"text/event-stream; charset=utf-8")


async def send_bytes(send: Send, status: int, body: bytes, headers: Headers) -> None:
    headers.append((b"content-length", b"%d" % len(body)))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, value: object, headers: Headers) -> None:
    await send_bytes(send, status, msgspec.json.encode(value), [*headers, JSON])


async def send_error(send: Send, error: ApiError, headers: Headers) -> None:
    extra = list(headers)
    if error.retry_after is not None:
        extra.append((b"retry-after", b"%d" % max(1, math.ceil(error.retry_after))))
    if error.status == 401:
        extra.append((b"www-authenticate", b"Bearer"))
    if isinstance(error, MethodNotAllowed):
        extra.append((b"allow", ", ".join(error.allowed).encode()))
    await send_json(send, error.status, error.body(), extra)


class EventStream:
    """A response that may take long to begin.

    Nothing is sent until the first `write` or `finish`; an ApiError before that is an ordinary HTTP
    error. After `first_timeout` seconds of silence the headers go out with status 200, and whenever
    `interval` seconds pass in silence, one keep-alive: a comment in a stream, a blank line in JSON.
    A late error is then an SSE error event, or an error object as the body.
    """

    def __init__(
        self, send: Send, headers: Headers, *, sse: bool, first_timeout: float, interval: float
    ) -> None:
        self._send = send
        self._headers = headers
        self._sse = sse
        self._interval = interval
        self.status = 200
        self._started = False
        self._silent = True
        self._beat: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(first_timeout, self._on_timer)

    async def write(self, data: bytes) -> None:
        """Send part of the body; waits while the client reads slower than we write."""
        self._silent = False
        if not self._started:
            await self._start()
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def finish(self, data: bytes) -> None:
        """Send the last part of the body."""
        self.close()
        if self._started:
            await self._send({"type": "http.response.body", "body": data})
            return
        self._started = True
        if self._sse:
            self._headers += [SSE, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
            await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._send({"type": "http.response.body", "body": data})
        else:
            self._headers.append(JSON)
            await send_bytes(self._send, 200, data, self._headers)

    async def fail(self, error: ApiError) -> None:
        """Report an error in the way that is still possible."""
        self.close()
        self.status = error.status
        if not self._started:
            self._started = True
            await send_error(self._send, error, self._headers)
            return
        body = msgspec.json.encode(error.body())
        data = b"data: " + body + b"\n\n" if self._sse else body
        await self._send({"type": "http.response.body", "body": data})

    def close(self) -> None:
        """No more keep-alives. Called on every way out."""
        self._timer.cancel()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None

    async def _start(self) -> None:
        self._started = True
        if self._sse:
            self._headers += [SSE, (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        else:
            self._headers.append(JSON)
        await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})

    def _on_timer(self) -> None:
        self._timer = self._loop.call_later(self._interval, self._on_timer)
        if self._silent and (self._beat is None or self._beat.done()):
            self._beat = self._loop.create_task(self._send_beat())
        self._silent = True

    async def _send_beat(self) -> None:
        if not self._started:
            await self._start()
        await self._send(
            {
                "type": "http.response.body",
                "body": b": keep-alive\n\n" if self._sse else b"\n",
                "more_body": True,
            }
        )
