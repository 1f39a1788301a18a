"""Reads what an engine publishes of its KV cache, without a gap (see `kv_events`). Needs pyzmq.

    connect -> replay from 0 -> follow -> ... -> follow        one life, until the connection breaks
                                  |  ^
                                  v  | a gap: replay from there
                                replay

The publisher numbers its batches from 0 and repeats those that it still has: who asks at the replay endpoint
gets them all, then an end mark. So a reader has either heard everything since the cache was empty, or knows
that it has not; then it is silent until the engine says that its cache is empty.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from deepseek_api_compat.engines.kv_events import Cleared, Decoder, KVEvent, KVSource

END = (-1).to_bytes(8, "big", signed=True)
REPLAY_TIMEOUT = 10.0  # seconds of silence in a replay
PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds between two lives of a connection
HEARTBEAT = 5000  # milliseconds; without one a peer that has lost its network would never be missed
LARGEST = 64 << 20  # bytes of a message; a batch of 8192 tokens has 60,000
QUEUE = 10_000  # messages that wait here; more make a gap, which is closed by a replay
logger = logging.getLogger("deepseek_api")


class _Broken(Exception):
    """The connection is gone, or the publisher does not answer."""


class KVReader:
    """One engine's events: `tell`s them in order, `lost` when they are no longer complete.

    After `lost` the next that is told begins with `Cleared`. What is none of an engine's messages is dropped
    and counted (`dropped`); a batch that can't be read is a gap. Failure policy: nothing that a publisher
    sends raises; whatever goes wrong, the events count as lost and the connection is made anew.
    """

    def __init__(
        self, source: KVSource, tell: Callable[[Sequence[KVEvent]], None], lost: Callable[[], None]
    ) -> None:
        self.dropped = 0
        self._source = source
        self._tell = tell
        self._lost = lost
        self._next: int | None = None  # the number of the batch that comes next; None: some are missing
        self._decoder = Decoder()
        self._context = zmq.asyncio.Context()

    async def run(self) -> None:
        """Read until cancelled."""
        pause = PAUSE
        try:
            while True:
                began = asyncio.get_running_loop().time()
                try:
                    await self._live()
                except _Broken:
                    pass
                except Exception:  # who routes must not go on with what is no longer followed
                    logger.exception("KV events at %s", self._source.events)
                self._forget()
                held = asyncio.get_running_loop().time() - began > LONGEST_PAUSE
                pause = PAUSE if held else min(LONGEST_PAUSE, 2 * pause)
                await asyncio.sleep(pause)
        finally:
            self._context.destroy(linger=0)

    async def _live(self) -> None:
        """One connection, from when it stands; ends when it breaks."""
        subscriber = self._socket(zmq.SUB)
        subscriber.subscribe(b"")
        monitor = subscriber.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        try:
            subscriber.connect(self._source.events)
            if (await recv_monitor_message(monitor))["event"] == zmq.EVENT_DISCONNECTED:
                return
            self._decoder = Decoder()
            if self._source.replay is not None:
                await self._replay(0)
            poller = zmq.asyncio.Poller()
            poller.register(monitor, zmq.POLLIN)
            poller.register(subscriber, zmq.POLLIN)
            while True:
                ready = dict(await poller.poll())
                if monitor in ready:  # before any message of the engine that is there next
                    return
                await self._take(await subscriber.recv_multipart())
                await asyncio.sleep(0)  # many may be waiting, and neither await above pauses then
        finally:
            subscriber.disable_monitor()
            monitor.close(linger=0)
            subscriber.close(linger=0)

    async def _take(self, frames: list[bytes]) -> None:
        if len(frames) != 3 or len(frames[1]) != 8:
            self.dropped += 1
            return
        number, payload = int.from_bytes(frames[1], "big"), frames[2]
        if self._next is not None and number > self._next and self._source.replay is not None:
            await self._replay(self._next)
        self._batch(number, payload)

    def _batch(self, number: int, payload: bytes) -> None:
        """Batch by batch: the next one, one that was there already, or one behind a gap."""
        if self._next is not None and number < self._next:
            return
        try:
            events = self._decoder.batch(payload)
        except (ValueError, RecursionError):
            self.dropped += 1
            if number == self._next:
                self._forget()
            return
        if self._next is None and number == 0:
            events = [Cleared(), *events]
        elif number != self._next:
            self._forget()
            events = _since_cleared(events)
            if not events:
                return
        self._next = number + 1
        if events:
            self._tell(events)

    async def _replay(self, first: int) -> None:
        """Take over what the publisher still has, from this batch on. Raises _Broken if it doesn't answer."""
        assert self._source.replay is not None
        dealer = self._socket(zmq.DEALER)
        try:
            dealer.connect(self._source.replay)
            await dealer.send_multipart([b"", first.to_bytes(8, "big")])
            heard = False
            while True:
                if not await dealer.poll(int(REPLAY_TIMEOUT * 1000)):
                    raise _Broken
                frames = await dealer.recv_multipart()
                # An empty frame, the topic in newer versions, the number, the batch.
                if len(frames) < 3 or len(frames[-2]) != 8:
                    self.dropped += 1
                    continue
                if frames[-2] == END:
                    break
                heard = True
                self._batch(int.from_bytes(frames[-2], "big"), frames[-1])
                await asyncio.sleep(0)
        finally:
            dealer.close(linger=0)
        if first == 0 and not heard:  # nothing was published yet, so nothing is in the cache
            self._next = 0
            self._tell([Cleared()])

    def _forget(self) -> None:
        if self._next is not None:
            self._next = None
            self._lost()

    def _socket(self, kind: int) -> zmq.asyncio.Socket:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.MAXMSGSIZE, LARGEST)
        socket.setsockopt(zmq.RCVHWM, QUEUE)
        socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT)
        return socket


def _since_cleared(events: Sequence[KVEvent]) -> list[KVEvent]:
    """From the last `Cleared` on, if there is one."""
    for place in range(len(events) - 1, -1, -1):
        if isinstance(events[place], Cleared):
            return list(events[place:])
    return []
