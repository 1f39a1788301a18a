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
from urllib.parse import unquote

import msgspec
from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser, parse_url
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from deepseek_api_compat.config import ServerSettings
from deepseek_api_compat.errors import ApiError, HeadersTooLarge, InvalidRequest, RequestTimeout
from deepseek_api_compat.gateway.response import JSON

MAX_HEADER_BYTES = 64 * 1024
MIN_BODY_RATE = 1024  # bytes a second, averaged over the body, once the body timeout has passed
METHODS = frozenset({b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH"})
_WORD = re.compile(rb"[A-Za-z]{1,7}\Z")


class Cycle:
    """One request and its answer: what there is of its body, and how far the answer is (`Responder`).

    In the place of uvicorn's own, most of which serves its `receive` and `send`; the gate asks for neither.
    """

    __slots__ = (
        "_waiter",
        "default_headers",
        "disconnected",
        "flow",
        "keep_alive",
        "more_body",
        "on_response",
        "parts",
        "response_complete",
        "response_started",
        "size",
        "transport",
        "unread",
        "waiting_for_100_continue",
    )

    def __init__(self, connection: HttpProtocol, *, keep_alive: bool) -> None:
        self.transport = connection.transport
        self.flow = connection.flow
        self.default_headers = connection.server_state.default_headers
        self.on_response = connection.on_response_complete
        self.keep_alive = keep_alive
        self.waiting_for_100_continue = connection.expect_100_continue
        self.disconnected = self.response_started = self.response_complete = False
        self.parts: list[bytes] = []
        self.size = self.unread = 0  # bytes of the body; those that came since somebody waited for some
        self.more_body = True
        self._waiter: asyncio.Future[None] | None = None

    def arrival(self) -> asyncio.Future[None]:
        """A future that is done when there is more of the body, or all of it."""
        if self.waiting_for_100_continue and not self.transport.is_closing():
            self.waiting_for_100_continue = False
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self.unread = 0
        self.flow.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        return self._waiter

    def arrived(self) -> None:
        """Wake who waits."""
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class HttpProtocol(HttpToolsProtocol):
    """One connection. `handler` is the task that serves its request, or has served the last one."""

    handler: asyncio.Task[None] | None = None
    cycle: Cycle  # type: ignore[assignment]

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
        self.connections.discard(self)
        if self.cycle is not None:
            self.cycle.disconnected = not self.cycle.response_complete
        self.flow.resume_writing()
        if exc is None:
            self.transport.close()
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
        self.url = b""
        self.headers = []
        self.expect_100_continue = False
        self._between = False
        self._in_headers = True
        self._received = 0
        self._owes_since = time.monotonic()

    def on_headers_complete(self) -> None:
        # Counted only where it may be too many; `_received` may begin behind the newest bytes.
        if self._received + self._newest > MAX_HEADER_BYTES and self._header_bytes() > MAX_HEADER_BYTES:
            raise ValueError("answered by send_400_response, since it comes out as the parser's error")
        parser = self.parser
        if parser.should_upgrade():
            if parser.get_method() == b"CONNECT":
                raise ValueError("a request for a tunnel: as above")
            return  # the message comes again, see _ignore_upgrade
        self._in_headers = False
        version = parser.get_http_version()
        url = parse_url(self.url)
        path = url.path.decode("ascii")
        busy = self.cycle is not None and not self.cycle.response_complete
        # The parser takes no more after a request that asks to close: the next one would wait.
        cycle = self.cycle = Cycle(self, keep_alive=version != "1.0" and parser.should_keep_alive())
        scope = {
            "type": "http",
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": url.path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "client": self.client,
            "connection": self,
            "cycle": cycle,  # with pipelining not always the connection's latest
        }
        if busy:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, scope))  # type: ignore[arg-type]
        else:
            self._serve(scope)

    def _serve(self, scope: dict[str, Any]) -> None:
        task = self.handler = self.loop.create_task(self.app(scope, None, None))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.parts.append(body)
        cycle.size += len(body)
        cycle.unread += len(body)
        if cycle.unread > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        cycle.arrived()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._between = True
        self._owes_since = None
        self.cycle.more_body = False
        self.cycle.arrived()

    def on_response_complete(self) -> None:
        """As uvicorn's, but idle connections are found by `sweep`: no timer is set for each answer."""
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        arriving = not self._between and not self._in_headers
        if self.pipeline:
            _, scope = self.pipeline.pop()
            self._serve(scope)  # type: ignore[arg-type]
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
