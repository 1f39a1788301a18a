"""API keys: their format, what is derived from them, and the table that authenticates keys and tokens.

A key is `DSK-<id>-<random>`: 12 characters of lower-case base32, and 43 letters and digits (256 bits).
Stored is only HMAC-SHA256(master, "key:" + key). The secret key, stored nowhere, is the hex form of
HMAC-SHA256(master, "secret:" + id + ":" + version). The prefixes keep the uses of the master key apart.

A key that another program made (`sk-...`, see `moving`) has an id too, but does not show it. Stored of it is
HMAC-SHA256(master, "foreign:" + its SHA-256 in hex), since of some only that is known; by this it is found.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string
import time
from collections.abc import Iterable
from math import inf
from typing import NamedTuple

import msgspec

from deepseek_api_compat.errors import AuthenticationFailed
from deepseek_api_compat.security import tokens
from deepseek_api_compat.security.network import AllowList
from deepseek_api_compat.security.scope import is_within, networks
from deepseek_api_compat.store.base import KeyLimits, KeyRecord, Role

PREFIX = "DSK-"
_ID_ALPHABET = string.ascii_lowercase + "234567"
_RANDOM_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 12
_RANDOM_LENGTH = 43
_ID = slice(len(PREFIX), len(PREFIX) + _ID_LENGTH)
_DASH = slice(_ID.stop, _ID.stop + 1)
_KEY_LENGTH = _DASH.stop + _RANDOM_LENGTH
_MAX_CACHED = 4096  # verified tokens
_BARE = re.compile(rb"[A-Za-z0-9]{48}")  # what new-api shows as sk-..., and takes without these three too

MISSING = "No API key: send the header 'Authorization: Bearer <API key>'."
NOT_BEARER = "The Authorization header must be 'Bearer <API key>'."
MALFORMED = "The API key is malformed: keys look like DSK-<id>-<random>. Was it cut off, or quoted?"
UNKNOWN = "The API key is wrong or was deleted."
DISABLED = "The API key is disabled."
EXPIRED = "The API key has expired."
ROTATED = "The API key was rotated, and the time in which the old one was good too is over: use the new one."
TOKEN_OF_UNKNOWN = "The token was made for a key that does not exist or was deleted."  # noqa: S105
BAD_SIGNATURE = "The token is not signed by the key's secret_key. Was the key rotated since?"


class Principal(msgspec.Struct, frozen=True, kw_only=True):
    """Who sends a request, and what it may do: a key, as narrowed by a temporary token.

    `index` is the key's slot (see KeyRecord), `budget` in micro-units. None means all or any, but `expires`
    (unix seconds) None: never, `limits`: see KeyLimits, `token_id` None: sent with the key itself.
    """

    id: str
    name: str
    owner: str = ""
    role: Role
    index: int
    expires: float | None = None
    models: frozenset[str] | None = None
    networks: AllowList | None = None
    limits: KeyLimits = KeyLimits()
    budget: int | None = None
    max_tokens: int | None = None
    token_id: str | None = None


def new_key(id: str | None = None) -> tuple[str, str]:
    """A fresh key: its id (a fresh one too, unless given), and the key itself."""
    id = id or "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))
    return id, f"{PREFIX}{id}-" + "".join(secrets.choice(_RANDOM_ALPHABET) for _ in range(_RANDOM_LENGTH))


def key_hash(master: bytes, key: bytes) -> bytes:
    """What is stored of a key."""
    return hmac.digest(master, b"key:" + key, "sha256")


def foreign_hash(master: bytes, sha256: str) -> bytes:
    """What is stored of a key that another program made, of which this is the SHA-256 in lower-case hex."""
    return hmac.digest(master, b"foreign:" + sha256.encode(), "sha256")


def secret_key(master: bytes, id: str, version: int) -> str:
    """The secret that signs this key's temporary tokens; a new `version` revokes the old ones."""
    return hmac.digest(master, f"secret:{id}:{version}".encode(), "sha256").hex()


class _Entry(NamedTuple):
    """A key in the table. `plain`: it is enabled and never expires, so its hash is all there is to check."""

    hash: bytes
    principal: Principal
    record: KeyRecord
    plain: bool


class _Verified(NamedTuple):
    """Whom a token speaks for, and the times between which it does."""

    principal: Principal
    since: float
    until: float


class KeyTable:
    """All keys, in memory. Never changes: when a key does, another table takes its place.

    What it takes for good: a key, also one that another program made and that was imported; the key before
    its rotation while that overlaps; tokens that such a key's secret signed. Tokens that were verified are
    remembered until they expire or the table is replaced, 4096 of them at most.

    Failure policy: authentication fails closed, and by AuthenticationFailed only.
    """

    __slots__ = ("_by_hash", "_entries", "_keyed", "_master", "_never", "_nobody", "_verified", "version")

    def __init__(self, records: Iterable[KeyRecord], master: bytes, version: int = 0) -> None:
        self.version = version
        self._master = master
        # HMAC with its prefix already taken in; a copy of it costs less than a fresh one.
        self._keyed = hmac.new(master, b"key:", "sha256")
        self._entries = {record.id.encode(): _entry(record) for record in records}
        # For foreign keys. Our own are here too, but nothing that is sent has their hash as a foreign one.
        self._by_hash = {entry.hash: entry for entry in self._entries.values()}
        self._by_hash |= {old: entry for entry in self._entries.values() if (old := entry.record.old_hash)}
        self._never = secrets.token_bytes(32)
        # Stands in for an unknown id, so that a wrong id takes the path, and the time, of a wrong secret.
        self._nobody = _entry(KeyRecord(id="", name="", role="user", hash=self._never, created=0))
        self._verified: dict[bytes, _Verified] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def authenticate(self, header_value: bytes | None, now: float | None = None) -> Principal:
        """The owner of the key or token in an Authorization header. Raises AuthenticationFailed.

        `now`: unix seconds; the clock's, if not given.
        """
        if not header_value:
            raise AuthenticationFailed(MISSING)
        scheme, _, value = header_value.partition(b" ")
        if scheme.lower() != b"bearer":
            raise AuthenticationFailed(NOT_BEARER)
        return self.authenticate_key(value.strip(b" "), now)

    def authenticate_key(self, value: bytes, now: float | None = None) -> Principal:
        """The owner of a key or token, alone as in an x-api-key header. Raises AuthenticationFailed."""
        if len(value) != _KEY_LENGTH or not value.startswith(b"DSK-") or value[_DASH] != b"-":
            return self._by_token(value, time.time() if now is None else now)
        stored, principal, record, plain = self._entries.get(value[_ID], self._nobody)
        keyed = self._keyed.copy()
        keyed.update(value)
        digest = keyed.digest()
        if hmac.compare_digest(stored, digest):
            if not plain:
                _check_usable(record, time.time() if now is None else now)
            return principal
        if not hmac.compare_digest(record.old_hash or self._never, digest):
            raise AuthenticationFailed(UNKNOWN)
        now = time.time() if now is None else now
        if now >= (record.old_until or 0):
            raise AuthenticationFailed(ROTATED, code="key_expired")
        _check_usable(record, now)
        return principal

    def _by_token(self, token: bytes, now: float) -> Principal:
        verified = self._verified.get(token)
        if verified is not None and verified.since <= now < verified.until:
            return verified.principal
        if not token.startswith(b"eyJ") and (foreign := self._find_foreign(token)):  # so begins a JWT's "{"
            return _usable_foreign(*foreign, now)
        if token.count(b".") != 2:
            raise AuthenticationFailed(MALFORMED if token else MISSING)
        verified = self._verify(token, now)
        if len(self._verified) >= _MAX_CACHED:
            del self._verified[next(iter(self._verified))]  # the oldest
        self._verified[token] = verified
        return verified.principal

    def _find_foreign(self, key: bytes) -> tuple[_Entry, bytes] | None:
        """The entry of a key that another program made, and the hash by which it was found.

        To look hashes up takes a time that tells nothing of them: who sends keys can't choose their hashes.
        """
        spellings = (key, b"sk-" + key) if _BARE.fullmatch(key) else (key,)
        for spelling in spellings:
            found = foreign_hash(self._master, hashlib.sha256(spelling).hexdigest())
            if entry := self._by_hash.get(found):
                return entry, found
        return None

    def _verify(self, token: bytes, now: float) -> _Verified:
        """A token checked from the beginning."""
        claims = tokens.read(token)
        entry = self._entries.get(claims.sub.encode())
        if entry is None:
            raise AuthenticationFailed(TOKEN_OF_UNKNOWN)
        record = entry.record
        until = self._secret_until(token, record, now)
        _check_usable(record, now)
        since, end = tokens.check_times(claims, now)
        expires = inf if record.expires is None else record.expires
        return _Verified(narrowed(entry.principal, claims), since, min(end, until, expires))

    def _secret_until(self, token: bytes, record: KeyRecord, now: float) -> float:
        """Until when the secret that signed `token` is good."""
        if tokens.is_signed_by(token, secret_key(self._master, record.id, record.version)):
            return inf
        until, version = record.old_until or 0, record.old_version or 0
        if now < until and tokens.is_signed_by(token, secret_key(self._master, record.id, version)):
            return until
        raise AuthenticationFailed(BAD_SIGNATURE, code="bad_signature")


def narrowed(principal: Principal, claims: tokens.Claims) -> Principal:
    """What a key's principal may do by a token with these claims.

    Raises AuthenticationFailed if they ask for more than the key may.
    """
    models = principal.models if claims.models is None else frozenset(claims.models)
    if principal.models is not None and models is not None and (wider := models - principal.models):
        raise _too_wide("model", min(wider))
    return msgspec.structs.replace(
        principal,
        expires=claims.exp if principal.expires is None else min(claims.exp, principal.expires),
        models=models,
        networks=_narrowed_networks(principal.networks, claims.networks),
        max_tokens=claims.max_tokens,
        token_id=claims.jti,
    )


def _narrowed_networks(of_key: AllowList | None, of_token: tuple[str, ...] | None) -> AllowList | None:
    if of_token is None:
        return of_key
    try:
        found = AllowList(networks(of_token))
    except ValueError as error:
        raise AuthenticationFailed(f"The token is malformed: {error}") from None
    for one in found:
        if of_key is not None and not is_within(one, of_key):
            raise _too_wide("network", str(one))
    return found


def _too_wide(kind: str, name: str) -> AuthenticationFailed:
    message = f"The token asks for the {kind} {name!r}, which its key may not use."
    return AuthenticationFailed(message, code="scope_too_wide")


def _usable_foreign(entry: _Entry, hash: bytes, now: float) -> Principal:
    if hash != entry.hash and now >= (entry.record.old_until or 0):
        raise AuthenticationFailed(ROTATED, code="key_expired")
    _check_usable(entry.record, now)
    return entry.principal


def _check_usable(record: KeyRecord, now: float) -> None:
    if not record.enabled:
        raise AuthenticationFailed(DISABLED, code="key_disabled")
    if record.expires is not None and now >= record.expires:
        raise AuthenticationFailed(EXPIRED, code="key_expired")


def _entry(record: KeyRecord) -> _Entry:
    principal = Principal(
        id=record.id,
        name=record.name,
        owner=record.owner,
        role=record.role,
        index=record.slot,
        expires=record.expires,
        models=None if record.models is None else frozenset(record.models),
        networks=_networks_of(record),
        limits=record.limits,
        budget=record.budget,
    )
    return _Entry(record.hash, principal, record, record.enabled and record.expires is None)


def _networks_of(record: KeyRecord) -> AllowList | None:
    try:
        return None if record.networks is None else AllowList(networks(record.networks))
    except ValueError:  # not written by this program: rather nobody than everybody
        return AllowList()
