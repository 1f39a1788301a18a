"""The upstream client against a server that says every byte itself, under both event loops."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from deepseek_api_compat.engines import upstream as module
from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.upstream import Hung, Response, Upstream
from deepseek_api_compat.errors import (
    ApiError,
    ConfigError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
)
from fakes.http_server import HttpServer, Peer, Request, Script, answering, chunked, ok

BOTH_LOOPS = True
# Key and certificate, self-signed, for localhost and 127.0.0.1, valid until 2126; only the test trusts it.
CERTIFICATE = Path(__file__).parent.parent / "fakes" / "localhost.pem"


@contextlib.asynccontextmanager
async def serving(
    script: Script, *, uds: str | None = None, base: str = "", read_timeout: float = 10.0, max_idle: int = 512
) -> AsyncIterator[tuple[HttpServer, Upstream]]:
    async with HttpServer(script, uds=uds) as server:
        endpoint = msgspec.structs.replace(server.endpoint, base=base)
        upstream = Upstream(endpoint, read_timeout=read_timeout, max_idle=max_idle)
        try:
            yield server, upstream
        finally:
            await upstream.close()


async def within(seconds: float, event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), seconds)


async def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Let the event loop turn until `condition()` holds."""

    async def turn() -> None:
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)

    await asyncio.wait_for(turn(), seconds)


async def chunks(response: Response) -> list[bytes]:
    found = []
    while data := await response.chunk():
        found.append(data)
    return found


# Requests


async def test_request_line_headers_and_body() -> None:
    seen: list[Request] = []

    async def script(peer: Peer) -> None:
        while request := await peer.request():
            seen.append(request)
            await peer.send(ok())

    async with HttpServer(script) as server:
        endpoint = msgspec.structs.replace(
            server.endpoint, base="/v1/", headers={"Authorization": "Bearer k"}
        )
        upstream = Upstream(endpoint)
        assert await upstream.fetch("POST", "/completion", b'{"a":1}') == (200, b"hello")
        await upstream.fetch("GET", "/models")
        await upstream.fetch("POST", "/empty")
        response = await upstream.request(
            "POST", "/raw", b"x", headers=b"Content-Type: text/plain\r\nX-Id: 7\r\n"
        )
        await response.read()
        await upstream.close()
    post, get, empty, raw = seen
    assert (post.method, post.path, post.body) == ("POST", "/v1/completion", b'{"a":1}')
    assert post.headers["host"] == f"127.0.0.1:{endpoint.port}"
    assert post.headers["authorization"] == "Bearer k"
    assert post.headers["content-type"] == "application/json"
    assert post.headers["accept-encoding"] == "identity"
    assert (get.method, get.path) == ("GET", "/v1/models")
    assert "content-length" not in get.headers
    assert empty.headers["content-length"] == "0"
    assert (raw.headers["content-type"], raw.headers["x-id"]) == ("text/plain", "7")


@pytest.mark.parametrize("path", ["/a b", "/a\r\nX: y", "a", "/\u00e9", ""])
async def test_a_path_that_would_break_the_request_line_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="request line"):
        await Upstream(Endpoint(port=1)).request("GET", path)


async def test_a_header_with_a_line_break_is_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError) as caught:
        Upstream(Endpoint(headers={"Authorization": "Bearer secret\n"}))
    assert "Authorization" in str(caught.value)
    assert "secret" not in str(caught.value)


async def test_tcp_has_no_delay() -> None:
    async with serving(answering(ok())) as (_, upstream):
        await upstream.fetch("GET", "/")
        (connection,) = upstream.connections
        raw = connection.transport.get_extra_info("socket")
        assert raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


async def test_a_large_body_is_sent_at_the_pace_of_the_server() -> None:
    body = bytes(range(256)) * (64 * 1024)  # 16 MiB, more than the kernel's buffers hold
    go = asyncio.Event()

    async def script(peer: Peer) -> None:
        await within(30, go)
        request = await peer.request()
        assert request is not None
        assert request.body == body
        await peer.send(ok())
        await peer.closed()

    async with serving(script) as (_, upstream):
        task = asyncio.create_task(upstream.fetch("POST", "/", body))
        await until(lambda: any(c.write_paused for c in upstream.connections))
        (connection,) = upstream.connections
        assert connection.transport.get_write_buffer_size() <= 2 * module.SLICE
        go.set()
        assert await task == (200, b"hello")


async def test_an_answer_before_the_end_of_a_large_body() -> None:
    """A 413 arrives; the rest of the body is not sent, and the connection not used again."""

    async def script(peer: Peer) -> None:
        await peer.reader.readuntil(b"\r\n\r\n")
        await peer.send(ok(b"too large", status="413 Too Large"))
        await peer.closed()

    async with serving(script) as (_, upstream):
        assert await upstream.fetch("POST", "/", bytes(32 << 20)) == (413, b"too large")
        assert not upstream._idle


# Responses


BODIES = {
    "length": ok(b"hello world", "X-Name: Value", "x-name: last"),
    "empty": ok(b""),
    "chunked": chunked(b"hello", b" ", b"world"),
    "trailers": chunked(b"hello", b" world")[:-2] + b"Expires: never\r\n\r\n",
    "extensions": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5;a=b\r\nhello\r\n0\r\n\r\n",
    "until close": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "http/1.0": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "interim": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\n" + ok(b"hello"),
    "204": b"HTTP/1.1 204 No Content\r\n\r\n",
    "304": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n",
}


@pytest.mark.parametrize("raw", BODIES.values(), ids=BODIES.keys())
@pytest.mark.parametrize("step", [1, 2, 7, 1000])
async def test_any_split_gives_the_same_response(raw: bytes, step: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        for start in range(0, len(raw), step):
            await peer.send(raw[start : start + step])
            await asyncio.sleep(0)

    async with serving(script) as (_, upstream):
        response = await upstream.request("GET", "/")
        body = await response.read()
    expected = {"length": b"hello world", "chunked": b"hello world", "trailers": b"hello world"}
    name = next(n for n, r in BODIES.items() if r is raw)
    assert body == expected.get(name, b"" if name in ("empty", "204", "304") else b"hello")
    assert response.status == (int(name) if name.isdigit() else 200)
    assert b"expires" not in response.headers
    assert b"link" not in response.headers
    if name == "length":
        assert response.headers[b"x-name"] == b"last"


async def test_head_has_no_body_and_its_connection_is_not_used_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")
        await peer.closed()

    async with serving(script) as (server, upstream):
        assert await upstream.fetch("HEAD", "/") == (200, b"")
        assert await upstream.fetch("HEAD", "/") == (200, b"")
        assert server.connections == 2


async def test_chunks_come_as_they_arrive() -> None:
    taken = asyncio.Event()

    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.send(chunked(b"one", b"two", end=False))
            await taken.wait()
            await peer.send(b"5\r\nthree\r\n0\r\n\r\n")

    async with serving(script) as (_, upstream):
        async with await upstream.request("POST", "/", b"{}") as response:
            assert await response.chunk() == b"onetwo"
            taken.set()
            assert await chunks(response) == [b"three"]
            assert await response.chunk() == b""
        assert len(upstream._idle) == 1


async def test_read_has_a_limit() -> None:
    async with serving(answering(ok(b"x" * 100))) as (_, upstream):
        response = await upstream.request("GET", "/")
        assert len(await response.read(100)) == 100
        response = await upstream.request("GET", "/")
        with pytest.raises(EngineFailed, match="longer than 99 bytes"):
            await response.read(99)


async def test_read_stops_an_endless_body_at_the_limit() -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            while True:
                await peer.send(b"x" * 65536)
        closed.set()

    async with serving(script) as (_, upstream):
        response = await upstream.request("GET", "/")
        with pytest.raises(EngineFailed, match="longer than"):
            await response.read(1_000_000)
        await within(30, closed)


# The pool


async def test_one_connection_serves_one_request_after_another() -> None:
    async with serving(answering(ok())) as (server, upstream):
        for _ in range(20):
            assert await upstream.fetch("GET", "/") == (200, b"hello")
        assert server.connections == 1


async def test_the_pool_grows_with_concurrency_and_keeps_max_idle() -> None:
    all_in = asyncio.Event()
    waiting = 0

    async def script(peer: Peer) -> None:
        nonlocal waiting
        while await peer.request():
            waiting += 1
            if waiting == 8:
                all_in.set()
            await within(30, all_in)
            await peer.send(ok())

    async with serving(script, max_idle=3) as (server, upstream):
        await asyncio.gather(*(upstream.fetch("GET", "/") for _ in range(8)))
        assert server.connections == 8
        assert len(upstream._idle) == 3
        await asyncio.gather(*(upstream.fetch("GET", "/") for _ in range(3)))
        assert server.connections == 8


async def test_the_freshest_connection_is_used_first() -> None:
    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.send(ok(str(peer.number).encode()))

    async with serving(script) as (_, upstream):
        first, second = await upstream.request("GET", "/"), await upstream.request("GET", "/")
        assert (await first.read(), await second.read()) == (b"1", b"1")
        a, b = await asyncio.gather(upstream.fetch("GET", "/"), upstream.fetch("GET", "/"))
        assert {a[1], b[1]} == {b"1", b"2"}
        last = upstream._idle[-1]
        await upstream.fetch("GET", "/")
        assert upstream._idle[-1] is last


@pytest.mark.parametrize(
    "raw",
    [ok(b"hello", "Connection: close"), ok().replace(b"HTTP/1.1", b"HTTP/1.0")],
    ids=["connection: close", "http/1.0"],
)
async def test_a_connection_that_the_server_gives_up_is_not_used_again(raw: bytes) -> None:
    async with serving(answering(raw)) as (server, upstream):
        for _ in range(3):
            assert await upstream.fetch("GET", "/") == (200, b"hello")
        assert server.connections == 3


@pytest.mark.parametrize("more", [b"garbage", ok(b"poison"), b"HTTP/1.1 20", b"\x00"])
async def test_more_than_was_asked_for_drops_the_connection(more: bytes) -> None:
    async with serving(answering(ok() + more)) as (server, upstream):
        for _ in range(3):
            assert await upstream.fetch("GET", "/") == (200, b"hello")
        assert server.connections == 3


async def test_bytes_on_an_idle_connection_drop_it() -> None:
    say, closed = asyncio.Event(), asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())
        await within(30, say)
        await peer.send(ok(b"poison"))
        await peer.closed()
        closed.set()

    async with serving(script) as (_, upstream):
        await upstream.fetch("GET", "/")
        assert len(upstream._idle) == 1
        say.set()
        await within(30, closed)
        assert not upstream._idle


async def test_an_idle_connection_that_the_server_closes_leaves_the_pool() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(ok())

    async with serving(script) as (server, upstream):
        for count in (1, 2):
            assert await upstream.fetch("GET", "/") == (200, b"hello")
            await until(lambda: not upstream.connections)
            assert not upstream._idle
            assert server.connections == count


async def test_a_connection_idle_for_long_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(answering(ok())) as (server, upstream):
        await upstream.fetch("GET", "/")
        monkeypatch.setattr(module, "KEEP_IDLE", 0.0)
        await upstream.fetch("GET", "/")
        assert server.connections == 2


async def stale(peer: Peer) -> None:
    """The first connection answers once and closes on its second request; later ones always answer."""
    while await peer.request():
        await peer.send(ok(str(peer.number).encode()))
        if peer.number == 1:
            await peer.request()
            return


async def test_a_stale_connection_is_retried_once_on_a_fresh_one() -> None:
    async with serving(stale) as (server, upstream):
        assert await upstream.fetch("POST", "/", b"{}") == (200, b"1")
        assert await upstream.fetch("POST", "/", b"{}") == (200, b"2")
        assert server.connections == 2


async def test_a_stale_connection_is_not_retried_if_told_so() -> None:
    async with serving(stale) as (server, upstream):
        await upstream.fetch("POST", "/", b"{}")
        with pytest.raises(EngineUnavailable):
            await upstream.request("POST", "/", b"{}", retry_stale=False)
        assert server.connections == 1


async def test_a_second_stale_connection_is_an_error() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(ok())
            await peer.request()

    async with serving(script) as (server, upstream):
        await upstream.fetch("GET", "/")
        with pytest.raises(EngineUnavailable) as caught:
            await upstream.request("GET", "/")
        assert caught.value.retry_after == 1
        assert upstream.where not in str(caught.value)  # clients needn't know our addresses
        assert server.connections == 2


@pytest.mark.parametrize("byte", [b"H", b"HTTP/1.1 200 OK\r\nContent-"])
async def test_no_retry_after_the_first_byte(byte: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        if peer.number == 1:
            await peer.send(ok())
            await peer.request()
            await peer.send(byte)

    async with serving(script) as (server, upstream):
        await upstream.fetch("GET", "/")
        with pytest.raises(EngineFailed, match="broke off"):
            await upstream.request("GET", "/")
        assert server.connections == 1


# Cancelling and closing


@pytest.mark.parametrize("when", ["headers", "chunk", "read", "close", "error"])
async def test_giving_up_closes_the_connection_at_once(when: str) -> None:
    for _ in range(40):  # one in time is enough: this machine has other things to do
        if await given_up(when) < 0.05:
            return
    raise AssertionError("never at once")


async def given_up(when: str) -> float:
    """How long after a client has given up the server sees it."""
    loop = asyncio.get_running_loop()
    reached, closed = asyncio.Event(), asyncio.Event()
    seen = 0.0

    async def script(peer: Peer) -> None:
        nonlocal seen
        await peer.request()
        if when == "headers":
            reached.set()
        else:
            await peer.send(chunked(b"data", end=False))
        await peer.closed()
        seen = loop.time()
        closed.set()

    async def call() -> None:
        response = await upstream.request("POST", "/", b"{}")
        assert await response.chunk() == b"data"
        reached.set()
        if when == "close":
            response.close()
        elif when == "error":
            async with response:
                raise KeyError
        else:
            await (response.chunk() if when == "chunk" else response.read())

    async with serving(script) as (_, upstream):
        task = asyncio.create_task(call())
        await within(30, reached)
        await until(lambda: task.done() or any(c._waiter for c in upstream.connections))
        start = loop.time()
        task.cancel()
        await asyncio.wait([task])
        await within(30, closed)
        assert not upstream._idle
        if when in ("headers", "chunk", "read"):
            assert task.cancelled()
        else:
            assert (task.exception() is None) == (when == "close")
    return seen - start


async def test_cancel_while_connecting_leaves_nothing_open() -> None:
    done: list[int] = []

    async def script(peer: Peer) -> None:
        while (request := await peer.request()) and request.path == "/last":
            await peer.send(ok())
        await peer.closed()
        done.append(peer.number)

    async with serving(script) as (server, upstream):
        for turns in range(12):  # at whatever stage of connecting
            task = asyncio.create_task(upstream.request("GET", "/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await upstream.fetch("GET", "/last")  # accepted after all others
        assert len(upstream._idle) == 1
        await upstream.close()
        await until(lambda: len(done) == server.connections)


async def test_closing_a_response_wakes_its_reader() -> None:
    async with serving(answering(chunked(end=False))) as (_, upstream):
        response = await upstream.request("GET", "/")
        reader = asyncio.create_task(response.chunk())
        await asyncio.sleep(0)
        response.close()
        with pytest.raises(EngineFailed, match="given up"):
            await reader


async def test_close_of_the_client_ends_requests_and_refuses_new_ones() -> None:
    asked = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        asked.set()
        await peer.closed()

    async with serving(script) as (_, upstream):
        task = asyncio.create_task(upstream.request("GET", "/"))
        await within(30, asked)
        await upstream.close()
        with pytest.raises(EngineUnavailable):
            await task
        assert not upstream.connections
        with pytest.raises(EngineUnavailable):
            await upstream.request("GET", "/")


async def test_close_of_the_client_while_connecting() -> None:
    async def script(peer: Peer) -> None:
        await peer.closed()

    for turns in range(6):
        async with serving(script) as (_, upstream):
            task = asyncio.create_task(upstream.request("GET", "/"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await upstream.close()
            with pytest.raises(EngineUnavailable):
                await asyncio.wait_for(task, 30)


# Backpressure


async def test_an_unread_body_stops_the_server() -> None:
    """Of 100 MB only what the kernel and HIGH_WATER hold is sent until somebody reads; then all of it."""
    part, count = b"x" * 100_000, 1000
    sent = 0
    blocked = asyncio.Event()

    async def script(peer: Peer) -> None:
        nonlocal sent
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (len(part) * count))
        for _ in range(count):
            peer.writer.write(part)
            drain = asyncio.ensure_future(peer.writer.drain())
            if not (await asyncio.wait([drain], timeout=0.2))[0]:
                blocked.set()
            await drain
            sent += len(part)
        await peer.closed()

    async with serving(script) as (_, upstream):
        response = await upstream.request("GET", "/")
        await within(60, blocked)
        (connection,) = upstream.connections
        assert sum(map(len, connection.parts)) <= 2 * module.HIGH_WATER
        assert sent < 20_000_000
        size = 0
        while data := await response.chunk():
            size += len(data)
        assert size == len(part) * count
        assert len(upstream._idle) == 1


async def test_framing_without_content_does_not_stall_the_reader() -> None:
    extension = b"1;" + b"e" * (2 * module.HIGH_WATER) + b"\r\n"

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(end=False) + extension)
        await peer.send(b"x\r\n0\r\n\r\n")
        await peer.closed()

    async with serving(script) as (_, upstream):
        assert await upstream.fetch("GET", "/") == (200, b"x")


# What goes wrong


async def failure(upstream: Upstream) -> ApiError:
    with pytest.raises(ApiError) as caught:
        await upstream.fetch("GET", "/")
    return caught.value


async def test_refused_and_missing_socket(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))  # bound, not listening: refuses
        port = holder.getsockname()[1]
        error = await failure(Upstream(Endpoint(port=port, headers={"Authorization": "Bearer secret"})))
    assert type(error) is EngineUnavailable
    assert error.retry_after == 1
    assert str(error) == "Can't reach the engine: Connection refused."
    assert "secret" not in str(error)
    path = str(tmp_path / "none.sock")
    error = await failure(Upstream(Endpoint(uds=path)))
    assert type(error) is EngineUnavailable
    assert str(error) == "Can't reach the engine: No such file or directory."


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70 + ".invalid"])
async def test_unknown_host(host: str) -> None:
    error = await failure(Upstream(Endpoint(host=host, port=80)))
    assert type(error) is EngineUnavailable
    assert host not in str(error)
    assert "no address" in str(error)


async def test_connect_timeout() -> None:
    with socket.socket() as listener, contextlib.ExitStack() as others:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):  # fill the queue of connections that nobody accepts
            other = others.enter_context(socket.socket())
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                other.connect(listener.getsockname())
        upstream = Upstream(Endpoint(port=listener.getsockname()[1]), connect_timeout=0.1)
        error = await failure(upstream)
    assert type(error) is EngineUnavailable
    assert "within 0.1 seconds" in str(error)
    assert not upstream.connections


async def test_closed_before_any_byte() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()

    async with serving(script) as (server, upstream):
        error = await failure(upstream)
        assert isinstance(error, EngineUnavailable)
        assert error.retry_after == 1
        assert server.connections == 1


async def test_closed_as_soon_as_accepted() -> None:
    async def script(peer: Peer) -> None:
        peer.reset()

    async with serving(script) as (_, upstream):
        for _ in range(20):
            assert isinstance(await failure(upstream), EngineUnavailable)


BROKEN = {
    "no last chunk": chunked(b"hello", end=False),
    "middle of a chunk": chunked(b"hello", end=False)[:-4],
    "short length": ok(b"hello").replace(b"Length: 5", b"Length: 6"),
    "in the headers": b"HTTP/1.1 200 OK\r\nContent-",
    "in an interim response": b"HTTP/1.1 100 Continue\r\n\r\n",
    "not http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "bad chunk size": chunked(b"hello", end=False) + b"zz\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
    "switching protocols": b"HTTP/1.1 101 X\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    "endless headers": b"HTTP/1.1 200 OK\r\n" + b"X-Fill: %b\r\n" % (b"x" * 1000) * 1000,
}


@pytest.mark.parametrize("raw", BROKEN.values(), ids=BROKEN.keys())
async def test_a_broken_response_is_an_error(raw: bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(raw)

    async with serving(script) as (server, upstream):
        assert isinstance(await failure(upstream), EngineFailed)
        assert not upstream._idle
        assert server.connections == 1


async def test_a_reset_is_no_end_of_a_body() -> None:
    reset = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(b"HTTP/1.1 200 OK\r\n\r\nhello")
        await within(30, reset)
        raw = peer.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        peer.reset()

    async with serving(script) as (_, upstream):
        response = await upstream.request("GET", "/")
        assert await response.chunk() == b"hello"
        reset.set()
        with pytest.raises(EngineFailed, match="broke off"):
            await response.chunk()


async def test_what_arrived_before_the_break_is_handed_out_first() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(b"one", b"two", end=False))

    async with serving(script) as (_, upstream):
        response = await upstream.request("GET", "/")
        await until(lambda: not upstream.connections)  # the end arrives before the reader looks
        assert await response.chunk() == b"onetwo"
        with pytest.raises(EngineFailed, match="broke off"):
            await response.chunk()


@pytest.mark.parametrize(
    ("said", "kind"),
    [(b"", EngineTimeout), (b"HTTP/1.1 200 OK\r\n", EngineTimeout), (chunked(b"a", end=False), Hung)],
    ids=["before", "in the headers", "in the body"],
)
async def test_silence_is_a_timeout(said: bytes, kind: type[ApiError]) -> None:
    closed = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(said)
        await peer.closed()
        closed.set()

    async with serving(script, read_timeout=0.3) as (_, upstream):
        error = await failure(upstream)
        assert type(error) is kind
        assert "0.3 seconds" in str(error)
        await within(30, closed)


async def test_a_slow_stream_is_not_a_timeout() -> None:
    async def script(peer: Peer) -> None:
        while await peer.request():
            await peer.send(chunked(end=False))
            for _ in range(6):
                await asyncio.sleep(0.1)
                await peer.send(b"1\r\nx\r\n")
            await peer.send(b"0\r\n\r\n")

    async with serving(script, read_timeout=0.5) as (server, upstream):
        for _ in range(2):  # the same timer watches both
            assert await upstream.fetch("GET", "/") == (200, b"xxxxxx")
        assert server.connections == 1


async def test_a_slow_reader_is_not_a_timeout() -> None:
    async with serving(answering(ok(b"x" * (8 << 20))), read_timeout=0.3) as (_, upstream):
        response = await upstream.request("GET", "/")
        await asyncio.sleep(0.7)  # the silence is ours
        assert len(await response.read()) == 8 << 20


# Other transports


async def test_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "engine.sock")
    async with serving(answering(ok()), uds=path, base="/x") as (server, upstream):
        for _ in range(3):
            assert await upstream.fetch("POST", "/y", b"{}") == (200, b"hello")
        assert server.connections == 1
        assert upstream.where == path


async def test_more_connect_at_once_than_a_unix_socket_lets_wait(tmp_path: Path) -> None:
    """As when a hundred answers leave a dead engine for this one."""
    path = str(tmp_path / "engine.sock")
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as others:
        listener.bind(path)
        listener.listen(1)
        with contextlib.suppress(BlockingIOError):
            while True:
                other = others.enter_context(socket.socket(socket.AF_UNIX))
                other.setblocking(False)
                other.connect(path)
        impatient = Upstream(Endpoint(uds=path), connect_timeout=0.1)
        error = await failure(impatient)
        assert type(error) is EngineUnavailable
        assert "within 0.1 seconds" in str(error)
        upstream = Upstream(Endpoint(uds=path), connect_timeout=30.0, read_timeout=30.0)
        answers = [asyncio.ensure_future(upstream.fetch("GET", "/")) for _ in range(40)]
        await asyncio.sleep(0.05)  # they have tried, and could not get in
        async with HttpServer(answering(ok()), uds=path, listener=listener.dup()):
            assert await asyncio.gather(*answers) == [(200, b"hello")] * 40
            await upstream.close()


async def test_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)
    async with HttpServer(answering(chunked(b"x" * 1_000_000, b"y")), tls=context) as server:
        untrusting = Upstream(server.endpoint)
        assert type(await failure(untrusting)) is EngineUnavailable
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        upstream = Upstream(server.endpoint)
        before = server.connections
        for _ in range(3):
            status, body = await upstream.fetch("GET", "/")
            assert (status, len(body)) == (200, 1_000_001)
        assert server.connections == before + 1
        await upstream.close()


async def test_a_silence_in_the_middle_may_be_allowed_less_than_the_one_before() -> None:
    async def script(peer: Peer) -> None:
        await peer.request()
        await peer.send(chunked(b"first", end=False))
        await peer.closed()

    async with serving(script) as (_server, upstream), await upstream.request("GET", "/") as response:
        assert await response.chunk() == b"first"
        response.expect_within(0.2)
        with pytest.raises(Hung, match=r"0\.2 seconds"):
            await response.chunk()
