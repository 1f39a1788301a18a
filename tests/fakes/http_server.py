"""A small HTTP server that misbehaves to order.

A test gives it a script: a coroutine function that is called for each connection with a `Peer` and says,
byte by byte, what the server does. When it returns, the connection is closed. What it raises, the test sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import NamedTuple

from deepseek_api_compat.engines.base import Endpoint


class Request(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Peer:
    """The server's end of one connection; `number` counts connections from 1."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        self.reader = reader
        self.writer = writer
        self.number = number

    async def request(self) -> Request | None:
        """The next request, or None when the client has closed."""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines)}
            body = await self.reader.readexactly(int(headers.get("content-length", "0")))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        method, path, _ = line.split(" ")
        return Request(method, path, headers, body)

    async def send(self, data: bytes) -> None:
        """Write, at the client's pace."""
        self.writer.write(data)
        await self.writer.drain()

    async def closed(self) -> None:
        """Wait until the client has closed; whatever it still sends is dropped."""
        with contextlib.suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def reset(self) -> None:
        """Close at once; the client may see a reset."""
        self.writer.transport.abort()


Script = Callable[[Peer], Awaitable[None]]


class HttpServer:
    """Runs a script for each connection, on a TCP port (0: one of its own) or a Unix socket.

    listener: a Unix socket at `uds` which listens already, and lets one connection wait.
    """

    def __init__(
        self,
        script: Script,
        *,
        uds: str | None = None,
        port: int = 0,
        tls: ssl.SSLContext | None = None,
        listener: socket.socket | None = None,
    ) -> None:
        self.connections = 0
        self._script = script
        self._uds = uds
        self._port = port
        self._tls = tls
        self._listener = listener
        self._peers: list[Peer] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> HttpServer:
        if self._listener is not None:
            self._server = await asyncio.start_unix_server(self._accept, sock=self._listener, backlog=1)
        elif self._uds is not None:
            self._server = await asyncio.start_unix_server(self._accept, self._uds)
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port, ssl=self._tls)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        for peer in self._peers:  # a task cancelled before its first step closes nothing
            peer.reset()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._server.wait_closed()
        for result in results:
            if isinstance(result, Exception):
                raise result

    @property
    def endpoint(self) -> Endpoint:
        if self._uds is not None:
            return Endpoint(uds=self._uds)
        return Endpoint(port=self._server.sockets[0].getsockname()[1], tls=self._tls is not None)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        peer = Peer(reader, writer, self.connections)
        self._peers.append(peer)
        self._tasks.append(asyncio.get_running_loop().create_task(self._run(peer)))

    async def _run(self, peer: Peer) -> None:
        try:
            await self._script(peer)
        except ConnectionError:
            pass
        finally:
            peer.writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await peer.writer.wait_closed()


def answering(response: bytes) -> Script:
    """Every request gets these bytes."""

    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.send(response)

    return script


def ok(body: bytes = b"hello", *headers: str, status: str = "200 OK") -> bytes:
    """A response with Content-Length."""
    lines = [f"HTTP/1.1 {status}", *headers, f"Content-Length: {len(body)}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """A chunked response, with its last chunk unless `end` is false."""
    body = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + body + (b"0\r\n\r\n" if end else b"")
