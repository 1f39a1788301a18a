"""Messages between the supervisor and its workers: one JSON object a line over a socket pair.

A worker starts with `Hello`, says `Started` when it accepts connections, and answers each `Keys`
with `Acknowledged`. When the other end closes, each side knows that its partner is dead.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Union

import msgspec

from deepseek_api_compat.config import Settings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.store.base import KeyRecord

LIMIT = 64 * 1024 * 1024


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Hello(Message, frozen=True):
    """All that a worker needs. `started`: Unix time of the start; `master`: the master key in hex."""

    worker: int
    started: int
    settings: Settings
    master: str
    version: int
    keys: Sequence[KeyRecord]
    engines: list[EngineState]


class Keys(Message, frozen=True):
    """The key table as it is now."""

    version: int
    keys: Sequence[KeyRecord]


class Engines(Message, frozen=True):
    """The state of all replicas as it is now."""

    engines: list[EngineState]


class Drain(Message, frozen=True):
    """Finish the requests in flight, take no new ones, exit."""


class Started(Message, frozen=True):
    """The worker accepts connections."""


class Acknowledged(Message, frozen=True):
    """The worker uses key table `version`."""

    version: int


AnyMessage = Union[Hello, Keys, Engines, Drain, Started, Acknowledged]  # noqa: UP007 - evaluated on Python 3.10

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message) + b"\n"


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[AnyMessage]:
    """Messages until the other side closes or dies."""
    while True:
        try:
            line = await reader.readline()
        except ConnectionError:
            return
        if not line.endswith(b"\n"):
            return
        yield _decoder.decode(line)
