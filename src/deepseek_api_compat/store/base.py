"""What is stored about API keys, and what every store promises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from deepseek_api_compat.store.audit import AuditEntry

Role = Literal["user", "admin", "metrics"]
MICRO = 1_000_000  # micro-units in one unit of the configured currency


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What one key may use. None means the configured default, 0 means no limit.

    rps: requests per second. burst: requests that may come at once. rpm, tpm: requests and tokens per minute.
    tpd: tokens per UTC day. concurrency: requests at a time.
    """

    rps: float | None = None
    burst: int | None = None
    rpm: int | None = None
    tpm: int | None = None
    tpd: int | None = None
    concurrency: int | None = None


class KeyRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One API key as it is kept: never the key itself, only its keyed hash.

    All times are in unix seconds. `models` and `networks` (CIDR strings) list what the key may use and where
    it may come from; None means all. `budget` is the money it may spend, in micro-units; None means any sum.

    `version` is that of the secret key, and grows with each rotation. Until `old_until` the key before the
    last rotation (`old_hash`) and tokens signed by its secret (`old_version`) are good too.

    `slot` numbers this key's counters in shared memory: small, unique among living keys, the same for the
    key's whole life, and given to another key only after this one is deleted.
    """

    id: str
    name: str
    role: Role
    hash: bytes
    version: int = 1
    owner: str = ""
    enabled: bool = True
    created: int
    expires: int | None = None
    models: tuple[str, ...] | None = None
    networks: tuple[str, ...] | None = None
    limits: KeyLimits = KeyLimits()
    budget: int | None = None
    old_hash: bytes | None = None
    old_version: int | None = None
    old_until: int | None = None
    slot: int = -1


# What an operator may change of a key; the rest changes by rotation, or never.
_OWN = ("name", "role", "owner", "enabled", "expires", "models", "networks", "budget")
CHANGEABLE = frozenset({*_OWN, *KeyLimits.__struct_fields__})


# What the audit log says of a change, made of the key as it is then.
Note = Callable[[KeyRecord], AuditEntry]


class KeyStore(Protocol):
    """Keys on disk, and the audit log of what was done to them. A change and its note are stored together.

    Calls block, so they run in a thread or in a command, never in an event loop.

    Failure policy: every fault of the database is a SetupError of one sentence, and nothing is half done.
    """

    def create(self, record: KeyRecord, note: Note | None = None) -> KeyRecord:
        """Store a new key and return it with the lowest free slot, whatever slot it came with."""
        ...

    def add(self, records: Sequence[KeyRecord], note: Note | None = None) -> Sequence[KeyRecord]:
        """Store all of these whose hash no key has, or had before its rotation; either all or none.

        Those that were stored, with their slots.
        """
        ...

    def list(self) -> Sequence[KeyRecord]:
        """All keys, oldest first."""
        ...

    def get(self, id: str) -> KeyRecord | None: ...

    def update(self, id: str, changes: Mapping[str, Any], note: Note | None = None) -> KeyRecord | None:
        """Give the fields in `changes` (of CHANGEABLE; each limit is one of its own) new values.

        Other fields keep theirs, even those that another process changes at this moment. The changed key, or
        None if there is no such id.
        """
        ...

    def rotate(self, id: str, hash: bytes, old_until: int, note: Note | None = None) -> KeyRecord | None:
        """Put `hash` in the place of the key's own, which is good until `old_until`, and count up `version`.

        The changed key, or None if there is no such id. What an earlier rotation had left is gone.
        """
        ...

    def delete(self, id: str, entry: AuditEntry | None = None) -> bool:
        """False if there is no such id."""
        ...

    def note(self, entry: AuditEntry) -> None:
        """Add to the audit log what changes no key."""
        ...

    def audit(self, limit: int, before: int | None = None) -> Sequence[AuditEntry]:
        """At most `limit` entries of the audit log, those with numbers below `before`, newest first."""
        ...

    def master_id(self) -> str | None:
        """The id of the master key that the stored hashes were made with; None if none was noted yet."""
        ...

    def set_master_id(self, id: str) -> None: ...

    def copy_to(self, file: Path) -> None:
        """Write all of it, as of one moment, to a new SQLite file that only its owner can read."""
        ...

    def close(self) -> None: ...
