"""What is stored about API keys, and what every store promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

Role = Literal["user", "admin", "metrics"]


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One API key as it is kept: never the key itself, only its keyed hash.

    `rps` is in requests per second: None means the configured default, 0 means no limit. `created` is in unix
    seconds. `slot` numbers this key's counters in shared memory: small, unique among living keys, the same
    for the key's whole life, and given to another key only after this one is deleted.
    """

    id: str
    name: str
    role: Role
    hash: bytes
    version: int = 1
    rps: float | None = None
    enabled: bool = True
    created: int
    slot: int = -1


class KeyStore(Protocol):
    """Keys on disk. Calls block, so they run in a thread or in a command, never in an event loop.

    Failure policy: every fault of the database is a SetupError of one sentence, and nothing is half done.
    """

    def create(self, record: KeyRecord) -> KeyRecord:
        """Store a new key and return it with the lowest free slot, whatever slot it came with."""
        ...

    def list(self) -> Sequence[KeyRecord]:
        """All keys, oldest first."""
        ...

    def get(self, id: str) -> KeyRecord | None: ...

    def set_enabled(self, id: str, enabled: bool) -> KeyRecord | None:
        """The changed key, or None if there is no such id."""
        ...

    def delete(self, id: str) -> bool:
        """False if there is no such id."""
        ...

    def close(self) -> None: ...
