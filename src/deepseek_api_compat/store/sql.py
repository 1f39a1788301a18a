"""Keys in SQL: SQLite in WAL mode in the data directory, or any database that a URL names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.audit import Actor, AuditEntry
from deepseek_api_compat.store.base import CHANGEABLE, KeyLimits, KeyRecord, Note
from deepseek_api_compat.store.database import Schema, make_private, one_sentence, open_database

DATABASE = "deepseek.db"
HEAD = "0003"

metadata = sa.MetaData()

keys = sa.Table(
    "keys",
    metadata,
    sa.Column("id", sa.String(12), primary_key=True),
    sa.Column("name", sa.String(100), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),
    sa.Column("hash", sa.LargeBinary(32), nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("rps", sa.Float),
    sa.Column("enabled", sa.Boolean, nullable=False),
    sa.Column("created", sa.BigInteger, nullable=False),
    sa.Column("slot", sa.Integer, nullable=False, unique=True),
    sa.Column("owner", sa.String(200), nullable=False, server_default=""),
    sa.Column("expires", sa.BigInteger),
    sa.Column("models", sa.Text),  # a JSON array, as are networks
    sa.Column("networks", sa.Text),
    *(sa.Column(name, sa.BigInteger) for name in KeyLimits.__struct_fields__ if name != "rps"),
    sa.Column("budget", sa.BigInteger),
    sa.Column("old_hash", sa.LargeBinary(32)),
    sa.Column("old_version", sa.Integer),
    sa.Column("old_until", sa.BigInteger),
)

# One row at most.
master_key = sa.Table("master_key", metadata, sa.Column("id", sa.String(32), primary_key=True))

# Triggers, which migration 0003 makes, keep its rows from being changed or deleted.
audit = sa.Table(
    "audit",
    metadata,
    sa.Column("number", sa.Integer, primary_key=True),
    sa.Column("at", sa.BigInteger, nullable=False),
    sa.Column("actor_kind", sa.String(16), nullable=False),
    sa.Column("actor_id", sa.String(100), nullable=False),
    sa.Column("request_id", sa.String(100)),
    sa.Column("op", sa.String(100), nullable=False),
    sa.Column("key_id", sa.String(12), nullable=False),
    sa.Column("key_name", sa.String(100), nullable=False),
    sa.Column("changes", sa.Text, nullable=False),  # a JSON object
    sqlite_autoincrement=True,  # no number is given twice
)

_next = sa.union(sa.select(sa.literal(0).label("slot")), sa.select(keys.c.slot + 1)).subquery()
_free_slot = sa.select(sa.func.min(_next.c.slot)).where(_next.c.slot.not_in(sa.select(keys.c.slot)))


class SqlStore:
    """A KeyStore in a SQL database; safe to use from several threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(self, record: KeyRecord, note: Note | None = None) -> KeyRecord:
        values = _columns(msgspec.structs.asdict(record))
        values["slot"] = _free_slot.scalar_subquery()
        with self._transaction() as connection:
            # One statement picks the slot and takes it, so two writers can't pick the same.
            connection.execute(keys.insert().values(values))
            created = _one(connection, record.id)
            assert created is not None
            if note is not None:
                _add_entry(connection, note(created))
            return created

    def add(self, records: Sequence[KeyRecord], note: Note | None = None) -> Sequence[KeyRecord]:
        added = []
        with self._transaction() as connection:
            # Changes nothing, but from here on nobody else writes to SQLite.
            connection.execute(keys.delete().where(sa.false()))
            rows = connection.execute(sa.select(keys.c.hash, keys.c.old_hash, keys.c.slot)).all()
            known = {hash for row in rows for hash in (row.hash, row.old_hash)}
            taken = {row.slot for row in rows}
            free = (slot for slot in count() if slot not in taken)
            for record in records:
                if record.hash in known:
                    continue
                known.add(record.hash)
                added.append(msgspec.structs.replace(record, slot=next(free)))
            if added:
                made = [_columns(msgspec.structs.asdict(record)) for record in added]
                connection.execute(keys.insert(), made)
            if added and note is not None:
                connection.execute(audit.insert(), [_entry_columns(note(record)) for record in added])
        return added

    def list(self) -> Sequence[KeyRecord]:
        with self._transaction() as connection:
            rows = connection.execute(keys.select().order_by(keys.c.created, keys.c.slot))
            return [_record(row) for row in rows]

    def get(self, id: str) -> KeyRecord | None:
        with self._transaction() as connection:
            return _one(connection, id)

    def update(self, id: str, changes: Mapping[str, Any], note: Note | None = None) -> KeyRecord | None:
        if unknown := set(changes) - CHANGEABLE:
            raise ValueError(f"not to be changed: {unknown}")
        return self._change(id, _columns(changes), note)

    def rotate(self, id: str, hash: bytes, old_until: int, note: Note | None = None) -> KeyRecord | None:
        moved = {"old_hash": keys.c.hash, "old_version": keys.c.version, "version": keys.c.version + 1}
        return self._change(id, {**moved, "hash": hash, "old_until": old_until}, note)

    def _change(self, id: str, values: Mapping[str, Any], note: Note | None) -> KeyRecord | None:
        with self._transaction() as connection:
            if values:
                connection.execute(keys.update().where(keys.c.id == id).values(values))
            changed = _one(connection, id)
            if changed is not None and note is not None:
                _add_entry(connection, note(changed))
            return changed

    def delete(self, id: str, entry: AuditEntry | None = None) -> bool:
        with self._transaction() as connection:
            deleted = connection.execute(keys.delete().where(keys.c.id == id)).rowcount > 0
            if deleted and entry is not None:
                _add_entry(connection, entry)
            return deleted

    def note(self, entry: AuditEntry) -> None:
        with self._transaction() as connection:
            _add_entry(connection, entry)

    def audit(self, limit: int, before: int | None = None) -> Sequence[AuditEntry]:
        query = audit.select().order_by(audit.c.number.desc()).limit(limit)
        if before is not None:
            query = query.where(audit.c.number < before)
        with self._transaction() as connection:
            return [_audit_entry(row) for row in connection.execute(query)]

    def master_id(self) -> str | None:
        with self._transaction() as connection:
            return connection.execute(sa.select(master_key.c.id)).scalar()

    def set_master_id(self, id: str) -> None:
        with self._transaction() as connection:
            connection.execute(master_key.delete())
            connection.execute(master_key.insert().values(id=id))

    def copy_to(self, file: Path) -> None:
        if self._engine.dialect.name != "sqlite":
            raise SetupError("The keys are in a database server: back them up by its own means.")
        make_private(file)
        with one_sentence(self._engine):
            connection = self._engine.raw_connection()
            try:
                connection.cursor().execute("VACUUM INTO ?", (str(file),))  # not allowed in a transaction
            finally:
                connection.close()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with one_sentence(self._engine), self._engine.begin() as connection:
            yield connection


def open_store(data_dir: Path, url: str | None = None) -> SqlStore:
    """Open the store, and make or upgrade its schema where needed. `data_dir` must exist. Raises SetupError.

    `url` is an SQLAlchemy URL; without it the store is `DATABASE` in `data_dir`, readable by its owner only.
    """
    schema = Schema(HEAD, "alembic_version", "deepseek_api_compat.store.migrations")
    return SqlStore(open_database(data_dir, DATABASE, url, schema))


def _one(connection: sa.Connection, id: str) -> KeyRecord | None:
    row = connection.execute(keys.select().where(keys.c.id == id)).first()
    return None if row is None else _record(row)


_LISTS = ("models", "networks")


def _columns(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a record as the columns of its row: limits one by one, lists as JSON."""
    values = dict(fields)
    if "limits" in values:
        values.update(msgspec.structs.asdict(values.pop("limits")))
    for name in _LISTS:
        if values.get(name) is not None:
            values[name] = msgspec.json.encode(values[name]).decode()
    return values


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    values: dict[str, Any] = dict(row._mapping)
    values["limits"] = KeyLimits(**{name: values.pop(name) for name in KeyLimits.__struct_fields__})
    for name in _LISTS:
        if values[name] is not None:
            values[name] = msgspec.json.decode(values[name], type=tuple[str, ...])
    return KeyRecord(**values)


def _add_entry(connection: sa.Connection, entry: AuditEntry) -> None:
    connection.execute(audit.insert().values(_entry_columns(entry)))


def _entry_columns(entry: AuditEntry) -> dict[str, Any]:
    return {
        "at": entry.at,
        "actor_kind": entry.actor.kind,
        "actor_id": entry.actor.id,
        "request_id": entry.actor.request_id,
        "op": entry.op,
        "key_id": entry.key_id,
        "key_name": entry.key_name,
        "changes": msgspec.json.encode(entry.changes).decode(),
    }


def _audit_entry(row: sa.Row[tuple[object, ...]]) -> AuditEntry:
    values: dict[str, Any] = dict(row._mapping)
    actor = Actor(values.pop("actor_kind"), values.pop("actor_id"), values.pop("request_id"))
    return AuditEntry(**{**values, "actor": actor, "changes": msgspec.json.decode(values["changes"])})
