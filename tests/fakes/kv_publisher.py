"""A publisher of KV events as vLLM and SGLang have it, over real ZeroMQ; it misbehaves on request."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from deepseek_api_compat.engines.kv_events import KVSource

END = (-1).to_bytes(8, "big", signed=True)


class Publisher:
    """Listens on Unix sockets in `folder`. topics: it repeats batches with their topic, as vLLM 0.32 does."""

    def __init__(self, folder: Path, *, keeps: int = 1000, replays: bool = True, topics: bool = True) -> None:
        self.source = KVSource(f"ipc://{folder}/kv", f"ipc://{folder}/kvr" if replays else None)
        self.asked: list[int] = []  # from which batch on it was asked to repeat
        self._topics = topics
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=keeps)
        self._next = 0
        self._context = zmq.asyncio.Context()
        self._publisher = self._context.socket(zmq.XPUB)
        self._publisher.bind(self.source.events)
        self._replay = self._context.socket(zmq.ROUTER)
        if self.source.replay is not None:
            self._replay.bind(self.source.replay)
        self._answering = asyncio.ensure_future(self._answer())

    async def subscribed(self) -> None:
        """Somebody listens now, and will hear what is published next."""
        assert await self._publisher.recv() == b"\x01"

    async def publish(self, *events: Any, lost: bool = False) -> None:
        """A batch; `lost`: it is kept, and never arrives."""
        await self.send(msgspec.msgpack.encode([1.5, list(events), 0]), lost=lost)

    async def send(self, payload: bytes, *, lost: bool = False) -> None:
        number, self._next = self._next, self._next + 1
        self._kept.append((number, payload))
        if not lost:
            await self.raw(b"kv", number.to_bytes(8, "big"), payload)

    async def raw(self, *frames: bytes) -> None:
        await self._publisher.send_multipart(frames)

    async def _answer(self) -> None:
        while True:
            client, _, first = await self._replay.recv_multipart()
            self.asked.append(int.from_bytes(first, "big"))
            topic, none = ([b"kv"], [b""]) if self._topics else ([], [])
            for number, payload in self._kept:
                if number >= self.asked[-1]:
                    frames = [client, b"", *topic, number.to_bytes(8, "big"), payload]
                    await self._replay.send_multipart(frames)
            await self._replay.send_multipart([client, b"", *none, END, b""])

    async def die(self) -> None:
        """As a killed engine does: another may listen in its place at once."""
        self._answering.cancel()
        await asyncio.gather(self._answering, return_exceptions=True)
        self._context.destroy(linger=0)
