"""One request and what came back, as it was on the wire."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from dataclasses import dataclass, field
from typing import Literal

from chaos.asks import Ask

End = Literal["complete", "left", "broken", "silent"]
PATIENCE = 150.0  # seconds for a whole exchange, those of a slow reader not counted
PATH = "/v1/chat/completions"


@dataclass
class Exchange:
    """complete: the answer's HTTP message has its end. left: the client went. broken: the connection did.
    silent: no end came within `PATIENCE`. Times are time.monotonic().
    """

    ask: Ask
    began: float
    ended: float = 0.0
    end: End = "silent"
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    first: float = 0.0  # when the head was there

    @property
    def id(self) -> str | None:
        return self.headers.get("x-request-id")


class Connection:
    """A client's connection, used for one exchange after the other while both sides keep it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._kept = True

    @property
    def usable(self) -> bool:
        """Whether it is good for another exchange: neither side has closed it."""
        return self._kept and not self._reader.at_eof()

    @classmethod
    async def open(cls, port: int, *, slow: bool = False) -> Connection:
        if not slow:
            return cls(*await asyncio.open_connection("127.0.0.1", port))
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=1024))

    async def exchange(self, ask: Ask, key: str) -> Exchange:
        """Send it and read the answer, with the manners of the ask."""
        found = Exchange(ask, time.monotonic())
        self._kept = False
        try:
            task = asyncio.ensure_future(self._exchange(found, key))
            patience = ask.leave if ask.leave is not None else PATIENCE
            done, _ = await asyncio.wait([task], timeout=patience)
            if done:
                await task
                self._kept = found.headers.get("connection") != "close"
            else:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                found.end = "left" if ask.leave is not None else "silent"
        except (ConnectionError, asyncio.IncompleteReadError):
            found.end = "broken"
        found.ended = time.monotonic()
        if not self._kept:
            self.close()
        return found

    def close(self) -> None:
        self._writer.transport.abort()

    async def _exchange(self, found: Exchange, key: str) -> None:
        data = found.ask.data
        head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._writer.write(head.encode() + data)
        await self._writer.drain()
        lines = (await self._reader.readuntil(b"\r\n\r\n"))[:-4].decode("latin-1").split("\r\n")
        found.first = time.monotonic()
        found.status = int(lines[0].split(" ")[1])
        found.headers = {
            name.lower(): value.strip() for name, _, value in (x.partition(":") for x in lines[1:])
        }
        if "content-length" in found.headers:
            found.body = await self._reader.readexactly(int(found.headers["content-length"]))
        else:
            while size := int(await self._reader.readuntil(b"\r\n"), 16):
                found.body += await self._reader.readexactly(size)
                await self._reader.readexactly(2)
                if found.ask.slow:
                    await asyncio.sleep(0.03)
            await self._reader.readexactly(2)
        found.end = "complete"


def described(found: Exchange) -> str:
    """All that is known of it, for a report."""
    body = found.body if len(found.body) < 6000 else found.body[:2500] + b" ... " + found.body[-3000:]
    asked = found.ask.body if isinstance(found.ask.body, bytes) else json.dumps(found.ask.body)
    return (
        f"  asked ({found.ask.key}, leaves {found.ask.leave}, slow {found.ask.slow}): {asked!r}\n"
        f"  {found.end} after {found.ended - found.began:.2f} s: {found.status} {found.headers}\n  {body!r}"
    )
