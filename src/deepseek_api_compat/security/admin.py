"""What can be done to keys, in one place: the command line does it here, directly or through the service."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.security.keys import key_hash, new_key, secret_key
from deepseek_api_compat.security.master import load_master_key
from deepseek_api_compat.store.base import KeyLimits, KeyRecord, KeyStore, Role
from deepseek_api_compat.store.datadir import make_data_dir
from deepseek_api_compat.store.sql import open_store

MAX_NAME = 100  # characters
MAX_RPS = 1e9


class KeyAdmin:
    """The operations `keys.*` over a store. They block; SetupError says in a sentence what was wrong.

    keys.create {name, role, rps}      {id, name, role, rps, api_key, secret_key}, shown this once
    keys.list {}                       [{id, name, role, rps, enabled, created}], oldest first
    keys.set_enabled {key, enabled}    the key, as in keys.list
    keys.delete {key}                  the key as it was, as in keys.list

    `key` is an id, or a name that only one key has.
    """

    def __init__(self, store: KeyStore, master: bytes) -> None:
        self.store = store
        self.master = master
        self._operations: dict[str, Callable[..., Any]] = {
            "keys.create": self._create,
            "keys.list": self._list,
            "keys.set_enabled": self._set_enabled,
            "keys.delete": self._delete,
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

    def _create(self, name: str, role: Role = "user", rps: float | None = None) -> dict[str, Any]:
        _check(name, role, rps)
        id, key = new_key()
        record = self.store.create(
            KeyRecord(
                id=id,
                name=name,
                role=role,
                hash=key_hash(self.master, key.encode()),
                limits=KeyLimits(rps=rps),
                created=int(time.time()),
            )
        )
        secret = secret_key(self.master, record.id, record.version)
        return {"id": id, "name": name, "role": role, "rps": rps, "api_key": key, "secret_key": secret}

    def _list(self) -> list[dict[str, Any]]:
        return [_shown(record) for record in self.store.list()]

    def _set_enabled(self, key: str, enabled: bool) -> dict[str, Any]:
        changed = self.store.update(self._find(key).id, {"enabled": bool(enabled)})
        if changed is None:
            raise SetupError(f"The key {key!r} was deleted meanwhile.")
        return _shown(changed)

    def _delete(self, key: str) -> dict[str, Any]:
        record = self._find(key)
        self.store.delete(record.id)
        return _shown(record)

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


def open_admin(data_dir: Path) -> KeyAdmin:
    """Open the data directory's keys; the first time, make all that they need. Raises SetupError."""
    make_data_dir(data_dir)
    store = open_store(data_dir)
    try:
        return KeyAdmin(store, load_master_key(data_dir, create=not store.list()))
    except BaseException:
        store.close()
        raise


def ensure_admin(admin: KeyAdmin) -> str | None:
    """On the first start, when there are no keys, make the key "admin" and return it, this once."""
    if admin.store.list():
        return None
    created = admin.handle("keys.create", {"name": "admin", "role": "admin"})
    return str(created["api_key"])


def _check(name: object, role: object, rps: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise SetupError(f"A key's name must have 1 to {MAX_NAME} printable characters.")
    if role not in get_args(Role):
        raise SetupError(f"A key's role must be one of {', '.join(get_args(Role))}, not {role!r}.")
    if rps is None:
        return
    if isinstance(rps, bool) or not isinstance(rps, (int, float)) or not 0 <= rps <= MAX_RPS:
        raise SetupError("A key's rps must be a number of requests per second, or 0 for no limit.")


def _shown(record: KeyRecord) -> dict[str, Any]:
    fields = ("id", "name", "role", "enabled", "created")
    return {"rps": record.limits.rps, **{field: getattr(record, field) for field in fields}}
