"""API keys: their format, what is derived from them, and the table that authenticates requests.

A key is `DSK-<id>-<random>`: 12 characters of lower-case base32, and 43 letters and digits (256 bits).
Stored is only HMAC-SHA256(master, "key:" + key). The secret key, stored nowhere, is the hex form of
HMAC-SHA256(master, "secret:" + id + ":" + version). The prefixes keep the two uses of the master key apart.
"""

from __future__ import annotations

import hmac
import secrets
import string
from collections.abc import Iterable

import msgspec

from deepseek_api_compat.errors import AuthenticationFailed
from deepseek_api_compat.store.base import KeyRecord, Role

PREFIX = "DSK-"
_ID_ALPHABET = string.ascii_lowercase + "234567"
_RANDOM_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 12
_RANDOM_LENGTH = 43
_ID = slice(len(PREFIX), len(PREFIX) + _ID_LENGTH)
_DASH = slice(_ID.stop, _ID.stop + 1)
_KEY_LENGTH = _DASH.stop + _RANDOM_LENGTH

MISSING = "No API key: send the header 'Authorization: Bearer <API key>'."
NOT_BEARER = "The Authorization header must be 'Bearer <API key>'."
MALFORMED = "The API key is malformed: keys look like DSK-<id>-<random>. Was it cut off, or quoted?"
UNKNOWN = "The API key is wrong or was deleted."
DISABLED = "The API key is disabled."


class Principal(msgspec.Struct, frozen=True):
    """Who sends a request. `rps` and `index` are the record's `rps` and `slot` (see KeyRecord)."""

    id: str
    name: str
    role: Role
    rps: float | None
    index: int


def new_key() -> tuple[str, str]:
    """A fresh key: its id, and the key itself."""
    id = "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    return id, f"{PREFIX}{id}-" + "".join(secrets.choice(_RANDOM_ALPHABET) for _ in range(_RANDOM_LENGTH))


def key_hash(master: bytes, key: bytes) -> bytes:
    """What is stored of a key."""
    return hmac.digest(master, b"key:" + key, "sha256")


def secret_key(master: bytes, id: str, version: int) -> str:
    """The secret that signs this key's temporary tokens; a new `version` revokes the old ones."""
    return hmac.digest(master, f"secret:{id}:{version}".encode(), "sha256").hex()


class KeyTable:
    """All keys, in memory. Never changes: a change makes a new table with the next version.

    Failure policy: authentication fails closed, and by AuthenticationFailed only.
    """

    __slots__ = ("_entries", "_keyed", "_master", "_nobody", "version")

    def __init__(self, records: Iterable[KeyRecord], master: bytes, version: int = 0) -> None:
        self.version = version
        self._master = master
        # HMAC with its prefix already taken in; a copy of it costs less than a fresh one.
        self._keyed = hmac.new(master, b"key:", "sha256")
        self._entries = {record.id.encode(): _entry(record) for record in records}
        # Stands in for an unknown id, so that a wrong id takes the path, and the time, of a wrong secret.
        self._nobody = (secrets.token_bytes(32), Principal("", "", "user", None, -1), False)

    def __len__(self) -> int:
        return len(self._entries)

    def authenticate(self, header_value: bytes | None) -> Principal:
        """The owner of the key in an Authorization header. Raises AuthenticationFailed."""
        if not header_value:
            raise AuthenticationFailed(MISSING)
        scheme, _, key = header_value.partition(b" ")
        if scheme.lower() != b"bearer":
            raise AuthenticationFailed(NOT_BEARER)
        key = key.strip(b" ")
        if len(key) != _KEY_LENGTH or not key.startswith(b"DSK-") or key[_DASH] != b"-":
            raise AuthenticationFailed(MALFORMED)
        stored, principal, enabled = self._entries.get(key[_ID], self._nobody)
        digest = self._keyed.copy()
        digest.update(key)
        if not hmac.compare_digest(stored, digest.digest()):
            raise AuthenticationFailed(UNKNOWN)
        if not enabled:
            raise AuthenticationFailed(DISABLED)
        return principal

    def with_record(self, record: KeyRecord) -> KeyTable:
        """This table with `record` added, or put in place of the one with its id."""
        return self._next({**self._entries, record.id.encode(): _entry(record)})

    def without(self, id: str) -> KeyTable:
        """This table less the key `id`, if it has it."""
        return self._next({other: entry for other, entry in self._entries.items() if other != id.encode()})

    def _next(self, entries: dict[bytes, tuple[bytes, Principal, bool]]) -> KeyTable:
        table = KeyTable((), self._master, self.version + 1)
        table._entries = entries
        return table


def _entry(record: KeyRecord) -> tuple[bytes, Principal, bool]:
    principal = Principal(record.id, record.name, record.role, record.rps, record.slot)
    return record.hash, principal, record.enabled
