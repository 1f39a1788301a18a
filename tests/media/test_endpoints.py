"""Models elsewhere that are slow, endless or gone."""

from __future__ import annotations

import asyncio

import pytest

from deepseek_api_compat.errors import EngineUnavailable
from deepseek_api_compat.media import endpoints
from deepseek_api_compat.media.endpoints import Endpoint
from fakes.chat_upstream import Play
from fakes.http_server import HttpServer, Peer, Request, ok

HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


async def dripping(peer: Peer, _: Request) -> None:
    """Sends a byte now and then, for ever: no pause is long."""
    await peer.send(HEAD)
    while not peer.writer.is_closing():
        await peer.send(b"1\r\n \r\n")
        await asyncio.sleep(0.02)


async def flooding(peer: Peer, _: Request) -> None:
    await peer.send(HEAD)
    while not peer.writer.is_closing():
        await peer.send(b"10000\r\n%b\r\n" % bytes(1 << 16))


def serving(play: Play) -> HttpServer:
    async def serve(peer: Peer) -> None:
        while request := await peer.request():
            await play(peer, request)

    return HttpServer(serve)


async def failing(play: Play, timeout: float) -> str:
    async with serving(play) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.endpoint.port}/v1/", "m", None, timeout)
        with pytest.raises(EngineUnavailable) as caught:
            await endpoint.transcribe(b"sound", "wav")
        await endpoint.close()
    assert caught.value.code == "media_endpoint_failed"
    return caught.value.message


async def test_an_answer_has_so_much_time_in_all() -> None:
    assert "took too long" in await failing(dripping, 0.3)


async def test_an_answer_has_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints, "MOST_BYTES", 1 << 20)
    assert "does not end its answer" in await failing(flooding, 30)


async def test_no_proxy_comes_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")

    async def said(peer: Peer, request: Request) -> None:
        # What stands in the format is the client's, and becomes no path.
        assert b'filename="sound.etcpasswd"' in request.body
        await peer.send(ok(b'{"text": " Good morning. "}'))

    async with serving(said) as server:
        endpoint = Endpoint(f"http://127.0.0.1:{server.endpoint.port}/v1", "m", None, 30)
        assert await endpoint.transcribe(b"sound", "../etc/passwd") == "Good morning."
        await endpoint.close()
