"""uvicorn's httptools protocol, with the manners that an API on the open network needs.

- a client that is slow to send its headers or body is answered 408 and closed;
- a client that stops reading its answer is cut off;
- headers over 64 KiB are refused;
- malformed HTTP is answered with an OpenAI error object;
- an offer to speak another protocol (curl --http2 makes one with each request) is ignored;
- a method spelled `Post` is accepted (the seed document's curl sends it; llhttp refuses it);
- when the client goes away the task that serves it is cancelled at once, without a watcher task.
"""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import msgspec
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deepseek_api_compat.config import ServerSettings
from deepseek_api_compat.errors import ApiError, HeadersTooLarge, InvalidRequest, RequestTimeout
from deepseek_api_compat.gateway.response import JSON

MAX_HEADER_BYTES = 64 * 1024
MIN_BODY_RATE = 1024  # bytes a second, averaged over the body, once the body timeout has passed
METHODS = frozenset({b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"})
_WORD = re.compile(rb"[A-Za-z]{1,7}\Z")


class HttpProtocol(HttpToolsProtocol):
    """One connection. `handler` is the task that serves it now; the gate sets and clears it."""

    handler: asyncio.Task[None] | None = None

    # Since when the client owes us the rest of a message; None while it owes nothing.
    _owes_since: float | None = None
    _between = True
    _in_headers = True
    _received = 0
    _newest = 0  # bytes that came together, the last of those received
    _held = b""
    # Since when the last answer is out and no next request has begun.
    _idle_since: float | None = None
    # Since when the client has not taken what was written; None while it keeps up.
    _stalled_since: float | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._owes_since = time.monotonic()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self.handler is not None:
            self.handler.cancel()

    def data_received(self, data: bytes) -> None:
        if self._between:
            if self._held:
                data, self._held = self._held + data, b""
            if not data.startswith((b"POST ", b"GET ")):
                data = self._normalise_method(data)
                if not data:
                    return
        self._newest = len(data)
        self._received += self._newest
        self._feed(data)
        if self._in_headers and self._received > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse_headers()

    def _feed(self, data: bytes) -> None:
        self._idle_since = None
        try:
            self.parser.feed_data(data)
        except HttpParserUpgrade as upgrade:
            self._ignore_upgrade(data[upgrade.args[0] :])
        except HttpParserError:
            self.send_400_response("")

    def _ignore_upgrade(self, rest: bytes) -> None:
        """Begin anew as if nothing had been offered: the parser takes what follows for the new protocol."""
        head = [b"%b %b HTTP/1.1\r\n" % (self.parser.get_method(), self.url)]
        head += [b"%b: %b\r\n" % (name, value) for name, value in self.headers if name != b"upgrade"]
        self.parser = HttpRequestParser(self)
        self._feed(b"%b\r\n%b" % (b"".join(head), rest))

    def _normalise_method(self, data: bytes) -> bytes:
        """Upper-case a known method; hold back what may yet become one."""
        word, space, rest = data.partition(b" ")
        if not space and _WORD.match(data):
            self._held = data
            return b""
        if word.upper() in METHODS:
            return word.upper() + space + rest
        return data

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]
        self._between = False
        self._in_headers = True
        self._received = 0
        self._owes_since = time.monotonic()

    def on_headers_complete(self) -> None:
        # Counted only where it may be too many; `_received` may begin behind the newest bytes.
        if self._received + self._newest > MAX_HEADER_BYTES and self._header_bytes() > MAX_HEADER_BYTES:
            raise ValueError("answered by send_400_response, since it comes out as the parser's error")
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise ValueError("a request for a tunnel: as above")
            return  # the message comes again, see _ignore_upgrade
        self._in_headers = False
        super().on_headers_complete()
        if not self.parser.should_keep_alive():
            # Not every uvicorn closes it then, but the parser takes no more: the next request would wait.
            self.cycle.keep_alive = False
        # Which cycle serves a request; with pipelining it is not always the connection's latest.
        self.scope["cycle"] = self.cycle  # type: ignore[typeddict-unknown-key]

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between = True
        self._owes_since = None
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """As uvicorn's, but idle connections are found by `sweep`: no timer is set for each answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        arriving = not self._between and not self._in_headers
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            task = self.loop.create_task(cycle.run_asgi(app))
            task.add_done_callback(self.tasks.discard)
            self.tasks.add(task)
        elif arriving and self.cycle.response_complete:
            # Answered before the request was all here (413, 401): don't read the rest.
            self.transport.close()
        else:
            self._idle_since = time.monotonic()

    def overdue(self, now: float, header_timeout: float, body_timeout: float) -> bool:
        """Whether the client has taken too long over the message it is sending."""
        if self._owes_since is None:
            return False
        elapsed = now - self._owes_since
        if self._in_headers:
            return elapsed > header_timeout
        return elapsed > body_timeout and self._received / elapsed < MIN_BODY_RATE

    def idle(self, now: float, keep_alive_timeout: float) -> bool:
        """Whether it has been kept for another request for long enough."""
        return self._idle_since is not None and now - self._idle_since > keep_alive_timeout

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stalled_since = time.monotonic()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stalled_since = None

    def stalled(self, now: float, write_timeout: float) -> bool:
        """Whether the client has read nothing of a full buffer for too long."""
        return self._stalled_since is not None and now - self._stalled_since > write_timeout

    def refuse(self, error: ApiError) -> None:
        """Answer without the application and close."""
        cycle = self.cycle
        if self.pipeline or (cycle is not None and cycle.response_started and not cycle.response_complete):
            self.transport.close()  # in the middle of another answer
            return
        body = msgspec.json.encode(error.body())
        head = STATUS_LINE[error.status] + JSON
        head += b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(head + body)
        self.transport.close()

    def _header_bytes(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers or ())

    def _refuse_headers(self) -> None:
        self.refuse(HeadersTooLarge(f"The request's headers are over {MAX_HEADER_BYTES} bytes."))

    def send_400_response(self, msg: str) -> None:
        if self._in_headers and self._header_bytes() > MAX_HEADER_BYTES:
            self._refuse_headers()
        else:
            self.refuse(InvalidRequest("The request is not valid HTTP."))


async def sweep(connections: set[Any], server: ServerSettings) -> None:
    """Close connections that are idle or whose clients are too slow; runs as long as the server does."""
    patience = min(
        server.header_timeout, server.body_timeout, server.write_timeout, server.keep_alive_timeout
    )
    while True:
        await asyncio.sleep(min(1.0, patience / 2))
        now = time.monotonic()
        for connection in list(connections):
            if not isinstance(connection, HttpProtocol):
                continue
            if connection.overdue(now, server.header_timeout, server.body_timeout):
                connection.refuse(RequestTimeout("The request was not complete in time."))
            elif connection.stalled(now, server.write_timeout):
                connection.transport.abort()
            elif connection.idle(now, server.keep_alive_timeout):
                connection.transport.close()
