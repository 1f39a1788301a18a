"""Replicas of one model behind its pool, as a request meets them: chat upstreams through the relay."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress

import msgspec

from deepseek_api_compat.config import EngineSettings, ModelSettings
from deepseek_api_compat.engines.base import Endpoint, EngineState, ModelInfo
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.relay import relay
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.slots import Leases, SlotTable, wake
from deepseek_api_compat.protocol.job import Job
from deepseek_api_compat.security.keys import Principal
from engines.contract import GREEDY, Counts, text_of

SLOTS = 4


class Out:
    """Where the relay writes: to whoever reads `parts`, which end with None."""

    def __init__(self) -> None:
        self.parts: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.written = False

    async def write(self, data: bytes) -> None:
        self.written = True
        self.parts.put_nowait(data)

    finish = write


class Account:
    """Of a request that nobody pays for."""

    def __init__(self) -> None:
        self.tally = Tally("/chat/completions", 0.0)
        self.principal = Principal(id="k", name="k", role="user", index=0)

    async def reserve(self, *_: object) -> None: ...

    async def dispatch(self, replica: int) -> None: ...

    def progress(self) -> None: ...

    def writing(self) -> None: ...


class Replicas:
    """A `Speaker`: so many replicas of one kind, all ready, which one worker knows. `close` it."""

    def __init__(
        self, settings: EngineSettings, endpoints: Sequence[Endpoint], info: ModelInfo, prompt: list[int]
    ) -> None:
        """`prompt` is that of token engines."""
        several = msgspec.structs.replace(settings, replicas=len(endpoints))
        self._memory = SharedMemory.create(SlotTable.cells_for([len(endpoints)], 1))
        self._pipe = os.pipe()
        self._table = SlotTable(self._memory, 0, [len(endpoints)], 1)
        self._leases = Leases(self._table, 0, self._pipe[1:], self._pipe[0], max_queue=9)
        self._leases.start(asyncio.get_running_loop())
        self._pool = ModelPool(0, ModelSettings(name="m", ready_timeout=0.0, engines=[several]), self._leases)
        self._states = [
            EngineState("m", number, settings.kind, "ready", endpoint, info=info)
            for number, endpoint in enumerate(endpoints)
        ]
        self._prompt = prompt
        for number in range(len(endpoints)):
            self._capacity(number, SLOTS)
        self._pool.update(self._states)

    def say(self, most: int) -> AsyncGenerator[str | Counts, None]:
        return self._relayed(most) if self._pool.kind == "chat" else self._streamed(most)

    async def _streamed(self, most: int) -> AsyncGenerator[str | Counts, None]:
        async with aclosing(self._pool.stream(Job(self._prompt, most, GREEDY))) as groups:
            async for pieces in groups:
                yield text_of(pieces)
                last = pieces[-1]
        yield Counts(last.prompt_tokens, last.completion_tokens, last.cached_tokens)

    async def _relayed(self, most: int) -> AsyncGenerator[str | Counts, None]:
        out, account = Out(), Account()
        message = {"role": "user", "content": "Sing."}
        body = {"model": "m", "messages": [message], "stream": True, "max_tokens": most, "temperature": 0}
        relaying = asyncio.ensure_future(
            relay(
                self._pool,
                "/chat/completions",
                json.dumps(body).encode(),
                out,  # type: ignore[arg-type]
                account,  # type: ignore[arg-type]
                stream=True,
                limit=most,
            )
        )
        relaying.add_done_callback(lambda _: out.parts.put_nowait(None))
        try:
            while (data := await out.parts.get()) is not None:
                if text := texts_in(data):
                    yield text
            await relaying
        finally:
            relaying.cancel()
            await asyncio.wait([relaying])
        tally = account.tally
        yield Counts(tally.prompt_tokens, tally.completion_tokens, tally.cached_tokens)

    async def drain(self, replica: int) -> None:
        """As the supervisor tells it, and what the worker does then."""
        self._states[replica] = msgspec.structs.replace(self._states[replica], state="drained")
        self._capacity(replica, 0)
        await self._tell(self._states)

    async def close(self) -> None:
        await self._tell([])
        await self._pool.close()

    def free(self) -> None:
        """Give back what the process has given; after `close`."""
        asyncio.get_running_loop().remove_reader(self._pipe[0])
        for end in self._pipe:
            os.close(end)
        self._memory.close()

    def _capacity(self, replica: int, slots: int) -> None:
        wake(self._pipe[1:], self._table.set_capacity(0, replica, slots))

    async def _tell(self, states: list[EngineState]) -> None:
        for client in self._pool.update(states):
            await client.close()


def texts_in(events: bytes) -> str:
    """What the chunks among the events say; what is none has passed unread."""
    texts = []
    for event in events.split(b"\n\n"):
        with suppress(msgspec.MsgspecError):
            texts += [one.delta.content for one in _chunk.decode(event[5:].strip()).choices]
    return "".join(texts)


class _Delta(msgspec.Struct):
    content: str = ""


class _Choice(msgspec.Struct):
    delta: _Delta


class _Chunk(msgspec.Struct):
    choices: list[_Choice]


_chunk = msgspec.json.Decoder(_Chunk)
