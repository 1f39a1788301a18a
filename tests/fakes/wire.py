"""An HTTP/1.1 client that shows what is on the wire: chunk by chunk, and byte by byte where a test wants it.

It checks what it reads: a header line without colon or a bad chunk length raises ValueError, a connection
that ends in the middle of a message raises ConnectionError.
"""

from __future__ import annotations

import json
import socket
import struct
from typing import Any, ClassVar, NamedTuple


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's error object; fails unless the body is exactly one."""
        document = self.json()
        assert list(document) == ["error"], document
        error = document["error"]
        assert set(error) == {"message", "type", "param", "code"}, error
        assert error["message"], error
        assert self.headers["content-type"] == "application/json"
        return dict(error)


def request(
    method: str, path: str, body: Any = b"", key: str | None = None, *headers: str, version: str = "1.1"
) -> bytes:
    """The bytes of a request; `body` is JSON unless it is bytes, Content-Length comes by itself."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{method} {path} HTTP/{version}", "Host: localhost", *headers]
    if key is not None:
        lines.append(f"Authorization: Bearer {key}")
    if (data or method == "POST") and not any(line.lower().startswith("transfer-enc") for line in headers):
        lines.append(f"Content-Length: {len(data)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


class Wire:
    """One connection to 127.0.0.1:`port`; `timeout` in seconds is for each read.

    Those that a test leaves open are closed after it (`close_all`).
    """

    _open: ClassVar[set[Wire]] = set()

    def __init__(self, port: int, timeout: float = 60.0) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._unread = b""
        self._open.add(self)

    @classmethod
    def close_all(cls) -> None:
        while cls._open:
            cls._open.pop().socket.close()

    def close(self) -> None:
        self.socket.close()
        self._open.discard(self)

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> Wire:
        self.socket.sendall(data)
        return self

    def answer(self, *, head_only: bool = False) -> Answer:
        """The next response, with its whole body."""
        status, headers = self.head()
        if head_only or status < 200:
            return Answer(status, headers, b"")
        return Answer(status, headers, self.body(headers))

    def body(self, headers: dict[str, str]) -> bytes:
        """The whole body of a response whose head has been read."""
        if "content-length" in headers:
            return self._exactly(int(headers["content-length"]))
        if headers.get("transfer-encoding") == "chunked":
            return b"".join(iter(self.chunk, b""))
        body = self._unread
        while data := self.socket.recv(65536):
            body += data
        self._unread = b""
        return body

    def head(self) -> tuple[int, dict[str, str]]:
        """Status and headers (lower-cased names) of the next response."""
        lines = self._until(b"\r\n\r\n")[:-4].decode("latin-1").split("\r\n")
        version, status = lines[0].split(" ")[:2]
        if version != "HTTP/1.1":
            raise ValueError(lines[0])
        headers = {}
        for line in lines[1:]:
            name, colon, value = line.partition(":")
            if not colon or name.lower() in headers:
                raise ValueError(f"bad header line {line!r}")
            headers[name.lower()] = value.strip()
        return int(status), headers

    def chunk(self) -> bytes:
        """The next chunk of a chunked body as it was framed; b"" is the last one."""
        data = self._exactly(int(self._until(b"\r\n"), 16))
        if self._exactly(2) != b"\r\n":
            raise ValueError("a chunk without its line end")
        return data

    def ended(self) -> bool:
        """Wait until the server closes; False if it sends something instead."""
        try:
            return not self._unread and self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def reset(self) -> None:
        """Leave the way a killed client does, by a reset."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def _until(self, mark: bytes) -> bytes:
        while mark not in self._unread:
            self._more()
        data, _, self._unread = self._unread.partition(mark)
        return data + mark

    def _exactly(self, size: int) -> bytes:
        while len(self._unread) < size:
            self._more()
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def _more(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise ConnectionError(f"the server closed in the middle of a message; so far: {self._unread!r}")
        self._unread += data


def call(port: int, data: bytes, **options: Any) -> Answer:
    """The answer to one request on a connection of its own."""
    with Wire(port) as wire:
        return wire.send(data).answer(**options)


def sse(body: bytes) -> list[str]:
    """The data of each event. Fails for anything but `data:` events and comments, each with a blank line."""
    assert body.endswith(b"\n\n"), body[-80:]
    events = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        if block.startswith("data: "):
            assert "\n" not in block, block
            events.append(block[6:])
        else:
            assert block.startswith(":"), block
            assert "\n" not in block, block
    return events


def text_of(body: bytes) -> str:
    """The text that the chunks of a chat stream add up to. Fails unless it ends with [DONE]."""
    *chunks, done = sse(body)
    assert done == "[DONE]", done
    deltas = [choice["delta"] for chunk in chunks for choice in json.loads(chunk)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)
