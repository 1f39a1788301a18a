"""What can be done to keys, in one place: commands do it here, directly or through the service."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from deepseek_api_compat.errors import AuthenticationFailed, NoSuchThing, SetupError, WrongValue
from deepseek_api_compat.security import tokens
from deepseek_api_compat.security.key_fields import convert, read_fields, shown
from deepseek_api_compat.security.keys import KeyTable, foreign_hash, key_hash, new_key, secret_key
from deepseek_api_compat.security.master import load_master_key, master_id, master_key_place, write_master_key
from deepseek_api_compat.store.audit import Actor, AuditEntry, this_user
from deepseek_api_compat.store.base import KeyLimits, KeyRecord, KeyStore
from deepseek_api_compat.store.datadir import make_data_dir
from deepseek_api_compat.store.sql import DATABASE, open_store

MAX_OVERLAP = 90 * 86_400  # seconds
_SHA256 = re.compile("[0-9a-fA-F]{64}")

# Operations after which every table of keys is as good as before.
READ_ONLY = frozenset({"keys.list", "keys.get", "keys.token", "keys.audit"})


class _Rotation(msgspec.Struct, kw_only=True):
    overlap: Annotated[int, msgspec.Meta(ge=0, le=MAX_OVERLAP)] = 0


class _Page(msgspec.Struct, kw_only=True):
    limit: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 100
    before: Annotated[int, msgspec.Meta(ge=1)] | None = None


class _Imported(msgspec.Struct, kw_only=True):
    keys: list[dict[str, Any]]


class _Token(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    expires_in: float = 3600
    models: list[str] | None = None
    networks: list[str] | None = None
    max_tokens: int | None = None


class KeyAdmin:
    """The operations `keys.*` over a store. They block; SetupError says in a sentence what was wrong.

    It is a WrongValue for parameters, NoSuchThing for a key that is not there, any other for the database.

    keys.create {name, FIELDS}           KEY and {api_key, secret_key}, shown this once
    keys.import {keys: [{sha256, FIELDS}]}    {created: [KEY], present: [sha256]}: keys that other programs
                                         made, all or none; those that are here already stay as they are
    keys.list {}                         [KEY], oldest first
    keys.get {key}                       KEY
    keys.update {key, FIELDS}            KEY; what is not named stays as it is
    keys.rotate {key, overlap}           KEY and a new {api_key, secret_key}; the old ones, and tokens signed
                                         by them, are good for `overlap` seconds more (0, unless given)
    keys.set_enabled {key, enabled}      KEY
    keys.delete {key}                    KEY as it was
    keys.token {key, expires_in, models, networks, max_tokens}      {token, token_id, expires}
    keys.audit {limit, before}           [{number, at, actor, op, key_id, key_name, changes}], newest first

    What makes or changes something, tokens included, is in the audit log, by the same transaction.

    `key` is an id, or a name that only one key has. FIELDS are name, role, owner, enabled, expires, models,
    networks, limits and budget (see key_fields.read_fields); KEY is all of them and more (key_fields.shown).
    """

    def __init__(self, store: KeyStore, master: bytes) -> None:
        self.store = store
        self.master = master
        self._operations: dict[str, Callable[..., Any]] = {
            "keys.create": self._create,
            "keys.import": self._import,
            "keys.list": self._list,
            "keys.get": self._get,
            "keys.update": self._update,
            "keys.rotate": self._rotate,
            "keys.set_enabled": self._set_enabled,
            "keys.delete": self._delete,
            "keys.token": self._token,
            "keys.audit": self._audit,
        }

    def handle(self, op: str, params: dict[str, Any], actor: Actor | None = None) -> Any:
        """The result of an operation, plain data for JSON. `actor`: whose doing it is; None: this user's."""
        operation = self._operations.get(op)
        if operation is None:
            raise SetupError(f"There is no operation {op!r}.")
        by = actor or this_user()
        try:
            inspect.signature(operation).bind(by, **params)
        except TypeError as error:
            named = re.search("'(.*)'", str(error))
            problem = f"Wrong parameters for {op}: {error}."
            raise WrongValue(problem, named[1] if named else None) from None
        return operation(by, **params)

    def _create(self, by: Actor, /, name: str, **fields: Any) -> dict[str, Any]:
        now = time.time()
        given = read_fields("keys.create", {"role": "user", "name": name, **fields}, now)
        id, key = new_key()
        record = _new_record(id, key_hash(self.master, key.encode()), now, given)
        nothing = dict.fromkeys(shown(record, now))
        created = self.store.create(record, lambda made: _entry(by, "keys.create", made, nothing))
        return self._shown_once(created, key)

    def _import(self, by: Actor, /, keys: list[dict[str, Any]]) -> dict[str, Any]:
        now = time.time()
        records: dict[str, KeyRecord] = {}
        for key in convert("keys.import", {"keys": keys}, _Imported).keys:
            fields = {name: value for name, value in key.items() if name != "sha256"}
            sha256 = key.get("sha256")
            if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
                raise WrongValue("A key to import needs its sha256: 64 hex digits.", "sha256")
            if "name" not in fields:
                raise WrongValue("A key to import needs a name.", "name")
            # One that has expired is taken over too: its owner reads that it has.
            given = read_fields("keys.import", {"role": "user", **fields}, -1.0)
            hash = foreign_hash(self.master, sha256.lower())
            records.setdefault(sha256, _new_record(new_key()[0], hash, now, given))
        nothing = dict.fromkeys(shown(next(iter(records.values())), now)) if records else {}
        added = self.store.add([*records.values()], lambda made: _entry(by, "keys.import", made, nothing))
        new = {record.id for record in added}
        present = [sha256 for sha256, record in records.items() if record.id not in new]
        return {"created": [shown(record, now) for record in added], "present": present}

    def _list(self, by: Actor, /) -> list[dict[str, Any]]:
        now = time.time()
        return [shown(record, now) for record in self.store.list()]

    def _get(self, by: Actor, /, key: str) -> dict[str, Any]:
        return shown(self._find(key), time.time())

    def _update(self, by: Actor, /, key: str, **fields: Any) -> dict[str, Any]:
        return self._change(by, "keys.update", key, fields)

    def _set_enabled(self, by: Actor, /, key: str, enabled: bool) -> dict[str, Any]:
        return self._change(by, "keys.set_enabled", key, {"enabled": enabled})

    def _change(self, by: Actor, op: str, key: str, fields: dict[str, Any]) -> dict[str, Any]:
        changes = read_fields(op, fields, time.time())
        old = self._find(key)
        before = shown(old, time.time())
        record = self.store.update(old.id, changes, lambda changed: _entry(by, op, changed, before))
        return shown(self._changed(key, record), time.time())

    def _rotate(self, by: Actor, /, key: str, overlap: int = 0) -> dict[str, Any]:
        rotation = convert("keys.rotate", {"overlap": overlap}, _Rotation)
        old = self._find(key)
        _, new = new_key(old.id)
        hash, until = key_hash(self.master, new.encode()), int(time.time()) + rotation.overlap
        before = shown(old, time.time())
        record = self.store.rotate(
            old.id, hash, until, lambda rotated: _entry(by, "keys.rotate", rotated, before)
        )
        return self._shown_once(self._changed(key, record), new)

    def _delete(self, by: Actor, /, key: str) -> dict[str, Any]:
        record = self._find(key)
        before = shown(record, time.time())
        self.store.delete(record.id, _entry(by, "keys.delete", record, before))
        return before

    def _audit(self, by: Actor, /, **page: Any) -> list[dict[str, Any]]:
        wanted = convert("keys.audit", page, _Page)
        entries: list[dict[str, Any]] = msgspec.to_builtins(self.store.audit(wanted.limit, wanted.before))
        return entries

    def _token(self, by: Actor, /, key: str, **options: Any) -> dict[str, Any]:
        wanted = convert("keys.token", options, _Token)
        record = self._find(key)
        secret = secret_key(self.master, record.id, record.version)
        try:
            token = tokens.issue(record.id, secret, **msgspec.structs.asdict(wanted))
        except ValueError as error:
            raise WrongValue(f"Such a token can't be made: {error}.") from None
        try:
            principal = KeyTable([record], self.master).authenticate_key(token.encode())
        except AuthenticationFailed as error:  # the key is disabled, expired or narrower
            raise WrongValue(f"Such a token would be refused: {error}") from None
        made = {"token_id": principal.token_id, "expires": tokens.read(token.encode()).exp}
        scope = {name: value for name, value in options.items() if value is not None and name != "expires_in"}
        self.store.note(_noted(by, "keys.token", record, {**made, **scope}))
        return {"token": token, **made}

    def close(self) -> None:
        self.store.close()

    def _find(self, key: str) -> KeyRecord:
        by_id = self.store.get(key) if isinstance(key, str) else None
        if by_id is not None:
            return by_id
        named = [record for record in self.store.list() if record.name == key]
        if not named:
            raise NoSuchThing(f"There is no key with the id or name {key!r}.")
        if len(named) > 1:
            ids = ", ".join(record.id for record in named)
            raise WrongValue(f"{len(named)} keys are named {key!r}: say which by its id ({ids}).", "key")
        return named[0]

    @staticmethod
    def _changed(key: str, record: KeyRecord | None) -> KeyRecord:
        if record is None:
            raise NoSuchThing(f"The key {key!r} was deleted meanwhile.")
        return record

    def _shown_once(self, record: KeyRecord, key: str) -> dict[str, Any]:
        secret = secret_key(self.master, record.id, record.version)
        return {**shown(record, time.time()), "api_key": key, "secret_key": secret}


def _new_record(id: str, hash: bytes, now: float, given: dict[str, Any]) -> KeyRecord:
    """A key with these fields, as `read_fields` gives them."""
    limits = {limit: given.pop(limit) for limit in KeyLimits.__struct_fields__ if limit in given}
    return KeyRecord(id=id, hash=hash, created=int(now), limits=KeyLimits(**limits), **given)


def _entry(by: Actor, op: str, record: KeyRecord, before: dict[str, Any]) -> AuditEntry:
    """An entry that names what is not as it was `before`."""
    now = shown(record, time.time())
    return _noted(by, op, record, {name: value for name, value in now.items() if value != before[name]})


def _noted(by: Actor, op: str, record: KeyRecord, changes: dict[str, Any]) -> AuditEntry:
    at = time.time_ns() // 1_000_000
    return AuditEntry(at=at, actor=by, op=op, key_id=record.id, key_name=record.name, changes=changes)


def open_admin(data_dir: Path) -> KeyAdmin:
    """Open the data directory's keys; the first time, make all that they need.

    Raises SetupError, also if the master key is not the one that the stored keys were made with.
    """
    make_data_dir(data_dir)
    store = open_store(data_dir)
    try:
        keys = store.list()
        master = load_master_key(data_dir, create=not keys)
        _check_master_id(store, master_id(master), master_key_place(data_dir), new=not keys)
        return KeyAdmin(store, master)
    except BaseException:
        store.close()
        raise


def _check_master_id(store: KeyStore, id: str, place: str, *, new: bool) -> None:
    noted = store.master_id()
    if noted == id:
        return
    if noted is not None and not new:
        raise SetupError(
            f"The master key in {place} is not the one that the keys in the database were made with: "
            f"its id is {id}, theirs is {noted}. Restore the right one from a backup."
        )
    store.set_master_id(id)


def backup_keys(data_dir: Path, target: Path) -> str:
    """Copy the key database, as of one moment, and the master key to a new directory that can take the place
    of `data_dir`. Safe while a service runs. Returns the master key's id. Raises SetupError."""
    admin = open_admin(data_dir)
    try:
        make_data_dir(target)
        if any(target.iterdir()):
            raise SetupError(f"The directory {target} is not empty: give a new one.")
        admin.store.copy_to(target / DATABASE)
        write_master_key(target, admin.master)
        return master_id(admin.master)
    finally:
        admin.close()


def ensure_admin(admin: KeyAdmin) -> str | None:
    """On the first start, when there are no keys, make the key "admin" and return it, this once."""
    if admin.store.list():
        return None
    created = admin.handle("keys.create", {"name": "admin", "role": "admin"}, Actor("service", "first start"))
    return str(created["api_key"])
