"""A small HTTP/1.1 client for engines: the gateway's hot path.

One `Upstream` talks to one `Endpoint` over a pool of keep-alive connections. A response is handed out as
soon as its headers are there; its body then comes as the socket delivers it, one `chunk()` for each read.

    response = await upstream.request("POST", "/completion", body)
    try:
        while data := await response.chunk():
            ...
    finally:
        response.close()

Cancelling a call closes its connection at once: that is how an engine learns that nobody waits any more.
Proxies are never used: engines are neighbours. Redirects, cookies and content codings are not handled
(`Accept-Encoding: identity` is sent). An `Upstream` belongs to one event loop.

Speed is a promise here, so there is no task, timer, queue or stream object for a request: the parser's
callbacks fill the connection, and a future exists only while somebody waits.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.errors import ApiError, ConfigError, EngineFailed, EngineTimeout, EngineUnavailable

HIGH_WATER = 256 * 1024  # unread bytes (or bytes of headers) after which a connection stops reading
SMALL_BODY = 64 * 1024  # up to here head and body are one write; above, slices that honour the peer's pace
SLICE = 256 * 1024
MAX_BODY = 64 * 1024 * 1024
MAX_HEADS = 256  # request heads kept; each (method, path) costs one
KEEP_IDLE = 60.0  # seconds; what lies idle longer may be cut by a firewall that tells nobody
RETRY_AFTER = 1.0
FIRST_PAUSE, LONGEST_PAUSE = 0.001, 0.05  # seconds between two attempts to get into a full queue

_PATH = re.compile(r"/[!-~]*")
_METHOD = re.compile(r"[A-Z]+")
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*")


class Unanswered(EngineUnavailable):
    """The connection closed before the first byte of a response: perhaps the request was never seen."""


class Lost(EngineFailed):
    """The connection broke or made no sense in the middle of a response: the engine may be dead."""


class Hung(Lost):
    """Nothing came for too long in the middle of a response."""


class Response:
    """The answer to one request: `status` and `headers` (lower-cased names; of a repeated one the last), then
    the body, for one reader.

    `close()` it in any case (or use `async with`): a body left unread keeps its connection from the pool.
    A body that breaks off raises `Lost` after its last bytes were handed out; silence for `read_timeout`
    seconds does too, or for as long as `expect_within` says.
    """

    __slots__ = ("_connection", "_error", "_rest", "headers", "status")

    headers: dict[bytes, bytes]

    def __init__(self, connection: _Connection) -> None:
        self.status = 0
        self._connection: _Connection | None = connection  # None: nothing more will come
        self._rest = b""  # what arrived last, when nothing more will come
        self._error: ApiError | None = None

    async def chunk(self) -> bytes:
        """Everything that arrived since the last call, waiting for something if need be; b"" at the end."""
        connection = self._connection
        if connection is None:
            return self._last()
        parts = connection.parts
        try:
            while not parts:
                await connection.arrival()
                if self._connection is None:
                    return self._last()
        except BaseException:
            self.close()
            raise
        return connection.take()

    def expect_within(self, seconds: float) -> None:
        """From now on no silence may last longer than so many seconds."""
        if self._connection is not None:
            self._connection.expect_within(seconds)

    async def read(self, limit: int = MAX_BODY) -> bytes:
        """The whole body. Raises EngineFailed when it is longer than `limit` bytes."""
        parts = []
        size = 0
        while self._connection is not None and size <= limit:
            data = await self.chunk()
            parts.append(data)
            size += len(data)
        if self._error is not None:
            raise self._error
        parts.append(self._rest)
        if size + len(self._rest) > limit:
            self.close()
            raise EngineFailed(f"The engine's answer is longer than {limit} bytes.")
        self._rest = b""
        return b"".join(parts)

    def close(self) -> None:
        """Done with it. If the body is not complete, the connection is closed at once."""
        if self._connection is not None:
            self._connection.fail(EngineFailed("The engine's answer was given up before its end."))
        self._rest = b""

    async def __aenter__(self) -> Response:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last(self) -> bytes:
        rest, self._rest = self._rest, b""
        if not rest and self._error is not None:
            raise self._error
        return rest

    def _end(self, rest: bytes, error: ApiError | None) -> None:
        self._connection = None
        self._rest = rest
        self._error = error


class _Connection(asyncio.Protocol):
    """One socket: idle in the pool (`_response` is None), or busy with exactly one request."""

    __slots__ = (
        "_abandoned",
        "_begun",
        "_complete",
        "_feed",
        "_head_only",
        "_headers",
        "_loop",
        "_now",
        "_parser",
        "_patience",
        "_paused",
        "_pool",
        "_response",
        "_reusable",
        "_status",
        "_timer",
        "_unread",
        "_waiter",
        "heard",
        "on_body",
        "parts",
        "sending",
        "transport",
        "write_paused",
    )

    transport: asyncio.Transport

    def __init__(self, pool: Upstream, loop: asyncio.AbstractEventLoop) -> None:
        self._pool = pool
        self._loop = loop
        self._now = loop.time
        self._abandoned = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._response: Response | None = None
        self._headers: dict[bytes, bytes] = {}
        self._status = 0  # of the final response; 0 until its headers are complete
        self._head_only = False
        self._begun = False  # a first byte of a response has come
        self._complete = False
        self._reusable = False
        self._unread = 0  # bytes that came since the reader last took some
        self._paused = False
        self._patience = pool.read_timeout  # seconds that the request in flight allows for a silence
        self.heard = 0.0  # loop time of the last progress
        self.parts: list[bytes] = []
        self.sending = False  # a large body is on its way
        self.write_paused = False
        # The parser looks its callbacks up now, and only once. The list's own method saves a call an event.
        self.on_body: Callable[[bytes], None] = self.parts.append
        self._parser = HttpResponseParser(self)
        self._feed: Callable[[bytes], None] = self._parser.feed_data

    # What requests and responses ask for

    def start(self, head_only: bool, data: bytes) -> Response:
        """Send a request (or the head of a large one) and become busy."""
        now = self.heard = self._now()
        self._patience = self._pool.read_timeout
        if self._timer is None:
            self._timer = self._loop.call_at(now + self._patience, self._check)
        self._status = self._unread = 0
        self._head_only = head_only
        self._begun = self._complete = self._reusable = False
        self._headers = {}
        response = self._response = Response(self)
        self.transport.write(data)
        return response

    def expect_within(self, seconds: float) -> None:
        """Set the longest silence of the request in flight."""
        if seconds < self._patience and self._timer is not None:
            self._timer.cancel()
            self._timer = self._loop.call_at(self._now() + seconds, self._check)
        self._patience = seconds

    def arrival(self) -> asyncio.Future[None]:
        """A future that is done when something has changed: bytes, the end, or room to write."""
        if self._unread:
            self._drained()  # what came was framing only: don't wait with the socket paused
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def take(self) -> bytes:
        """The body bytes at hand."""
        parts = self.parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        parts.clear()
        self._drained()
        return data

    def fail(self, error: ApiError) -> None:
        """Close the socket now; a request in flight ends with `error`, after the bytes that are there."""
        self._end(error)
        self.transport.abort()

    def abandon(self) -> None:
        """Nobody wants this connection any more, made or not."""
        self._abandoned = True
        if hasattr(self, "transport"):
            self.transport.abort()

    # What the socket tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        if self._abandoned or self._pool.closed:
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        response = self._response
        if response is None:  # bytes that nobody asked for: what follows could pass for the next response
            self.transport.abort()
            return
        self.heard = self._now()
        try:
            self._feed(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            if not self._complete:
                self.fail(Lost(f"The engine sent malformed HTTP ({error})."))
                return
            self._reusable = False
        if self._complete:
            self._response = None
            response._connection = None
            if self._reusable and not self.sending and not self._paused:
                self._pool.release(self)
            else:
                self.transport.abort()
        else:
            self._unread += len(data)
            if self._unread > HIGH_WATER:
                self._full()
        waiter = self._waiter
        if waiter is not None:
            self._waiter = None
            if not waiter.done():
                waiter.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._response is None:
            pass
        elif not self._begun:
            self._end(Unanswered("The engine closed the connection.", retry_after=RETRY_AFTER))
        elif self._status and exc is None and _ends_at_eof(self._response.headers):
            self._end(None)
        else:
            self._end(Lost("The engine broke off in the middle of its answer."))
        if self._timer is not None:
            self._timer.cancel()
        self._pool.forget(self)
        del self._parser, self._feed  # a cycle with self; streams of llama.cpp would leave one each

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        self.heard = self._now()
        self._wake()

    # What the parser finds (see on_body in __init__)

    def on_message_begin(self) -> None:
        self._begun = True
        if self._complete:
            self._reusable = False  # more than was asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:  # later ones are trailers
            self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if self._complete:
            return
        if status < 200:  # interim, like 100 Continue; the final response follows
            self._headers = {}
            return
        self._status = status
        response = self._response
        assert response is not None
        response.status = status
        response.headers = self._headers
        if self._head_only:  # the parser can't know, and would wait for a body: used up
            self._complete = True

    def on_message_complete(self) -> None:
        if not self._status or self._complete:
            return
        self._complete = True
        self._reusable = self._parser.should_keep_alive()
        parts = self.parts
        if parts:
            assert self._response is not None
            self._response._rest = parts[0] if len(parts) == 1 else b"".join(parts)
            parts.clear()

    # Inside

    def _end(self, error: ApiError | None) -> None:
        response = self._response
        if response is not None:
            self._response = None
            response._end(b"".join(self.parts), error)
            self.parts.clear()
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _full(self) -> None:
        if not self._status:
            self.fail(EngineFailed("The engine sent too many bytes of headers."))
        elif not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def _drained(self) -> None:
        if not self._status:
            return  # bytes of headers are counted to their end
        self._unread = 0
        if self._paused:
            self._paused = False
            self.heard = self._now()  # the silence was ours
            self.transport.resume_reading()

    def _check(self) -> None:
        """The read timeout. One timer serves many requests: it is set again only when it fires."""
        self._timer = None
        if self._response is None:
            return
        now = self._now()
        due = (now if self._paused else self.heard) + self._patience
        if due > now:
            self._timer = self._loop.call_at(due, self._check)
            return
        message = f"The engine sent nothing for {self._patience:g} seconds."
        self.fail(Hung(message) if self._status else EngineTimeout(message))


class Upstream:
    """HTTP client for one endpoint; safe for any number of concurrent requests.

    connect_timeout, read_timeout: seconds; the latter is the longest silence, not the length of a response.
    max_idle: connections kept for reuse. One that the engine closes leaves the pool at once; if a request has
    just been sent on it, that request goes out once more, on a fresh connection.

    Raises EngineUnavailable when the engine can't be reached or closes before the first byte of its answer,
    EngineTimeout when it stays silent before its headers are complete, `Lost` (`Hung` for a silence) for
    what goes wrong later. Messages name the address, never a header.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        connect_timeout: float = 5.0,
        read_timeout: float = 600.0,
        max_idle: int = 512,
    ) -> None:
        self.endpoint = endpoint
        self.where = endpoint.uds or _authority(endpoint.host, endpoint.port)
        self.read_timeout = read_timeout
        self.connections: set[_Connection] = set()  # open ones, busy and idle
        self.closed = False
        self._connect_timeout = connect_timeout
        self._max_idle = max_idle
        self._idle: list[_Connection] = []  # the last one in is the first out: the freshest
        self._gone: asyncio.Future[None] | None = None
        self._base = endpoint.base.rstrip("/")
        self._heads: dict[tuple[str, str], bytes] = {}
        self._fixed, self._has_type = _fixed_headers(endpoint, self.where)
        self._ssl = ssl.create_default_context() if endpoint.tls else None

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: bytes = b"",
        retry_stale: bool = True,
    ) -> Response:
        """Send a request; returns when status and headers have arrived.

        path: percent-encoded; it follows `endpoint.base`. headers: extra lines, trusted, b"Name: value\\r\\n"
        each. A body is JSON unless a header says otherwise. `retry_stale=False`: send at most once.
        """
        head = self._heads.get((method, path)) or self._make_head(method, path)
        if body:
            if not self._has_type and not (headers and b"content-type:" in headers.lower()):
                headers += b"Content-Type: application/json\r\n"
            large = len(body) > SMALL_BODY
            data = b"%b%bContent-Length: %d\r\n\r\n%b" % (head, headers, len(body), b"" if large else body)
        else:
            large = False
            length = b"" if method in ("GET", "HEAD", "DELETE") else b"Content-Length: 0\r\n"
            data = b"%b%b%b\r\n" % (head, headers, length)
        connection = self._take_idle()
        fresh = connection is None
        while True:
            if connection is None:
                connection = await self._connect()
            response = connection.start(method == "HEAD", data)
            try:
                if large:
                    await _send_slices(connection, response, body)
                while not response.status and response._error is None:
                    await connection.arrival()
            except BaseException:
                response.close()
                raise
            if response.status:
                return response
            assert response._error is not None
            if fresh or not retry_stale or type(response._error) is not Unanswered:
                raise response._error
            connection, fresh = None, True

    async def fetch(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """Status and whole body (at most MAX_BODY bytes)."""
        response = await self.request(method, path, body)
        return response.status, await response.read()

    async def close(self) -> None:
        """Close all connections, also busy ones, and wait until they are closed."""
        self.closed = True
        for connection in list(self.connections):
            connection.fail(self._unavailable("the client was closed"))
        if self.connections:
            self._gone = asyncio.get_running_loop().create_future()
            await self._gone

    # What connections ask for

    def release(self, connection: _Connection) -> None:
        """`connection` has done its work."""
        if len(self._idle) < self._max_idle:
            self._idle.append(connection)
        else:
            connection.transport.abort()

    def forget(self, connection: _Connection) -> None:
        """`connection` has been lost."""
        self.connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if self._gone is not None and not self.connections and not self._gone.done():
            self._gone.set_result(None)

    # Inside

    def _take_idle(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport.is_closing():
                continue
            if connection.heard + KEEP_IDLE > connection._now():
                return connection
            connection.transport.abort()
        return None

    def _make_head(self, method: str, path: str) -> bytes:
        target = self._base + path
        # Checked here, once for each path, because a line break would smuggle a request.
        if not _METHOD.fullmatch(method) or not _PATH.fullmatch(target):
            raise ValueError(f"not a request line: {method!r} {target!r}")
        head = f"{method} {target} HTTP/1.1\r\n".encode() + self._fixed
        if len(self._heads) >= MAX_HEADS:
            self._heads.clear()
        self._heads[method, path] = head
        return head

    async def _connect(self) -> _Connection:
        if self.closed:
            raise self._unavailable("the client was closed")
        loop = asyncio.get_running_loop()
        connection = _Connection(self, loop)
        # Not wait_for: before Python 3.12 it can swallow a cancellation, or lose a connection just made.
        task = loop.create_task(self._open(loop, connection))
        task.add_done_callback(_retrieve)
        try:
            await asyncio.wait((task,), timeout=self._connect_timeout)
            if not task.done():
                raise TimeoutError(f"no connection within {self._connect_timeout:g} seconds")
            task.result()
            if self.closed or connection.transport.is_closing():  # made and lost already
                raise ConnectionError("the connection was closed at once")
        except BaseException as error:
            task.cancel()
            connection.abandon()
            if not isinstance(error, (OSError, UnicodeError)):
                raise
            raise self._unavailable(_reason(error)) from error
        # Not before: uvloop does not report the loss of a connection whose making was cancelled.
        self.connections.add(connection)
        return connection

    def _unavailable(self, reason: object) -> EngineUnavailable:
        return EngineUnavailable(f"Can't reach the engine: {reason}.", retry_after=RETRY_AFTER)

    async def _open(self, loop: asyncio.AbstractEventLoop, connection: _Connection) -> None:
        endpoint = self.endpoint
        name = endpoint.host if endpoint.tls else None
        if endpoint.uds is not None:
            made = await _unix_socket(endpoint.uds)
            await loop.create_unix_connection(
                lambda: connection, sock=made, ssl=self._ssl, server_hostname=name
            )
        else:  # both event loops set TCP_NODELAY
            await loop.create_connection(
                lambda: connection, endpoint.host, endpoint.port, ssl=self._ssl, server_hostname=name
            )


async def _unix_socket(path: str) -> socket.socket:
    """A connection to it. Waits while as many wait to be accepted as may: Linux refuses more, with EAGAIN.

    A TCP connection would wait in the kernel. asyncio takes a refusal for a connection, uvloop for a failure.
    """
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.setblocking(False)
        pause = FIRST_PAUSE
        while True:
            try:
                made.connect(path)
                return made
            except BlockingIOError:
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
    except BaseException:
        made.close()
        raise


async def _send_slices(connection: _Connection, response: Response, body: bytes) -> None:
    """Send a large body at the peer's pace; stops early when the response is there before the end."""
    view = memoryview(body)
    connection.sending = True
    for start in range(0, len(view), SLICE):
        if response._connection is None:
            return
        connection.transport.write(view[start : start + SLICE])
        while connection.write_paused and response._connection is not None:
            await connection.arrival()
    connection.sending = False


def _authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: OSError | UnicodeError) -> str:
    """Why connecting failed, without the address: the sentence reaches clients."""
    if isinstance(error, ssl.SSLError):
        return f"TLS failed ({error.reason})"
    if isinstance(error, (TimeoutError, ConnectionError)) and not error.errno:
        return str(error)  # raised here
    if isinstance(error, UnicodeError) or not error.errno or error.errno < 0:
        return "its name has no address that answers"
    return os.strerror(error.errno)


def _fixed_headers(endpoint: Endpoint, where: str) -> tuple[bytes, bool]:
    """The header lines of every request, and whether a Content-Type is among them."""
    headers = {
        "host": ("Host", "localhost" if endpoint.uds else where),
        "user-agent": ("User-Agent", "deepseek-api-compat"),
        "accept-encoding": ("Accept-Encoding", "identity"),
    }
    headers.update({name.lower(): (name, value) for name, value in endpoint.headers.items()})
    lines = [f"{name}: {value}" for name, value in headers.values()]
    for line in lines:
        if not _HEADER.fullmatch(line):
            name = line.partition(":")[0]
            raise ConfigError(f"The header {name!r} for {where} has characters that HTTP forbids.")
    return "".join(f"{line}\r\n" for line in lines).encode("latin-1"), "content-type" in headers


def _ends_at_eof(headers: dict[bytes, bytes]) -> bool:
    """Whether a response with these headers has no other end than that of the connection (RFC 9112, 6.3)."""
    coding = headers.get(b"transfer-encoding", b"").strip().lower()
    return not coding.endswith(b"chunked") and (bool(coding) or b"content-length" not in headers)


def _retrieve(task: asyncio.Task[None]) -> None:
    """Keep a connect that nobody waits for any more from being reported as unhandled."""
    if not task.cancelled():
        task.exception()
