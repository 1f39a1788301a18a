"""What can be done to keys, in one place: commands do it here, directly or through the service."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec

from deepseek_api_compat.errors import AuthenticationFailed, SetupError
from deepseek_api_compat.security import tokens
from deepseek_api_compat.security.key_fields import convert, read_fields, shown
from deepseek_api_compat.security.keys import KeyTable, key_hash, new_key, secret_key
from deepseek_api_compat.security.master import load_master_key, master_id, master_key_place, write_master_key
from deepseek_api_compat.store.base import KeyLimits, KeyRecord, KeyStore
from deepseek_api_compat.store.datadir import make_data_dir
from deepseek_api_compat.store.sql import DATABASE, open_store

MAX_OVERLAP = 90 * 86_400  # seconds

# Operations after which every table of keys is as good as before.
READ_ONLY = frozenset({"keys.list", "keys.get", "keys.token"})


class _Rotation(msgspec.Struct, kw_only=True):
    overlap: Annotated[int, msgspec.Meta(ge=0, le=MAX_OVERLAP)] = 0


class _Token(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    expires_in: float = 3600
    models: list[str] | None = None
    networks: list[str] | None = None
    max_tokens: int | None = None


class KeyAdmin:
    """The operations `keys.*` over a store. They block; SetupError says in a sentence what was wrong.

    keys.create {name, FIELDS}           KEY and {api_key, secret_key}, shown this once
    keys.list {}                         [KEY], oldest first
    keys.get {key}                       KEY
    keys.update {key, FIELDS}            KEY; what is not named stays as it is
    keys.rotate {key, overlap}           KEY and a new {api_key, secret_key}; the old ones, and tokens signed
                                         by them, are good for `overlap` seconds more (0, unless given)
    keys.set_enabled {key, enabled}      KEY
    keys.delete {key}                    KEY as it was
    keys.token {key, expires_in, models, networks, max_tokens}      {token, token_id, expires}

    `key` is an id, or a name that only one key has. FIELDS are name, role, owner, enabled, expires, models,
    networks, limits and budget (see key_fields.read_fields); KEY is all of them and more (key_fields.shown).
    """

    def __init__(self, store: KeyStore, master: bytes) -> None:
        self.store = store
        self.master = master
        self._operations: dict[str, Callable[..., Any]] = {
            "keys.create": self._create,
            "keys.list": self._list,
            "keys.get": self._get,
            "keys.update": self._update,
            "keys.rotate": self._rotate,
            "keys.set_enabled": self._set_enabled,
            "keys.delete": self._delete,
            "keys.token": self._token,
        }

    def handle(self, op: str, params: dict[str, Any]) -> Any:
        """The result of an operation, plain data for JSON."""
        operation = self._operations.get(op)
        if operation is None:
            raise SetupError(f"There is no operation {op!r}.")
        try:
            inspect.signature(operation).bind(**params)
        except TypeError as error:
            raise SetupError(f"Wrong parameters for {op}: {error}.") from None
        return operation(**params)

    def _create(self, name: str, **fields: Any) -> dict[str, Any]:
        now = time.time()
        given = read_fields("keys.create", {"role": "user", "name": name, **fields}, now)
        limits = {limit: given.pop(limit) for limit in KeyLimits.__struct_fields__ if limit in given}
        id, key = new_key()
        hash = key_hash(self.master, key.encode())
        record = KeyRecord(id=id, hash=hash, created=int(now), limits=KeyLimits(**limits), **given)
        return self._shown_once(self.store.create(record), key)

    def _list(self) -> list[dict[str, Any]]:
        now = time.time()
        return [shown(record, now) for record in self.store.list()]

    def _get(self, key: str) -> dict[str, Any]:
        return shown(self._find(key), time.time())

    def _update(self, key: str, **fields: Any) -> dict[str, Any]:
        changes = read_fields("keys.update", fields, time.time())
        return shown(self._changed(key, self.store.update(self._find(key).id, changes)), time.time())

    def _rotate(self, key: str, overlap: int = 0) -> dict[str, Any]:
        rotation = convert("keys.rotate", {"overlap": overlap}, _Rotation)
        id, new = new_key(self._find(key).id)
        until = int(time.time()) + rotation.overlap
        record = self.store.rotate(id, key_hash(self.master, new.encode()), until)
        return self._shown_once(self._changed(key, record), new)

    def _set_enabled(self, key: str, enabled: bool) -> dict[str, Any]:
        return self._update(key, enabled=enabled)

    def _delete(self, key: str) -> dict[str, Any]:
        record = self._find(key)
        self.store.delete(record.id)
        return shown(record, time.time())

    def _token(self, key: str, **options: Any) -> dict[str, Any]:
        wanted = convert("keys.token", options, _Token)
        record = self._find(key)
        secret = secret_key(self.master, record.id, record.version)
        try:
            token = tokens.issue(record.id, secret, **msgspec.structs.asdict(wanted))
        except ValueError as error:
            raise SetupError(f"Such a token can't be made: {error}.") from None
        try:
            principal = KeyTable([record], self.master).authenticate_key(token.encode())
        except AuthenticationFailed as error:  # the key is disabled, expired or narrower
            raise SetupError(f"Such a token would be refused: {error}") from None
        return {"token": token, "token_id": principal.token_id, "expires": tokens.read(token.encode()).exp}

    def close(self) -> None:
        self.store.close()

    def _find(self, key: str) -> KeyRecord:
        by_id = self.store.get(key) if isinstance(key, str) else None
        if by_id is not None:
            return by_id
        named = [record for record in self.store.list() if record.name == key]
        if not named:
            raise SetupError(f"There is no key with the id or name {key!r}.")
        if len(named) > 1:
            ids = ", ".join(record.id for record in named)
            raise SetupError(f"{len(named)} keys are named {key!r}: say which by its id ({ids}).")
        return named[0]

    @staticmethod
    def _changed(key: str, record: KeyRecord | None) -> KeyRecord:
        if record is None:
            raise SetupError(f"The key {key!r} was deleted meanwhile.")
        return record

    def _shown_once(self, record: KeyRecord, key: str) -> dict[str, Any]:
        secret = secret_key(self.master, record.id, record.version)
        return {**shown(record, time.time()), "api_key": key, "secret_key": secret}


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
    created = admin.handle("keys.create", {"name": "admin", "role": "admin"})
    return str(created["api_key"])
