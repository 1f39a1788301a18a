"""Keys in SQL: SQLite in WAL mode in the data directory, or any database that a URL names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa

from deepseek_api_compat.store.base import KeyRecord
from deepseek_api_compat.store.database import Schema, one_sentence, open_database

DATABASE = "deepseek.db"
HEAD = "0001"

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
)

_next = sa.union(sa.select(sa.literal(0).label("slot")), sa.select(keys.c.slot + 1)).subquery()
_free_slot = sa.select(sa.func.min(_next.c.slot)).where(_next.c.slot.not_in(sa.select(keys.c.slot)))


class SqlStore:
    """A KeyStore in a SQL database; safe to use from several threads and processes."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def create(self, record: KeyRecord) -> KeyRecord:
        values = {name: getattr(record, name) for name in record.__struct_fields__ if name != "slot"}
        with self._transaction() as connection:
            # One statement picks the slot and takes it, so two writers can't pick the same.
            connection.execute(keys.insert().values(**values, slot=_free_slot.scalar_subquery()))
            return _one(connection, record.id)

    def list(self) -> Sequence[KeyRecord]:
        with self._transaction() as connection:
            rows = connection.execute(keys.select().order_by(keys.c.created, keys.c.slot))
            return [_record(row) for row in rows]

    def get(self, id: str) -> KeyRecord | None:
        with self._transaction() as connection:
            row = connection.execute(keys.select().where(keys.c.id == id)).first()
            return None if row is None else _record(row)

    def set_enabled(self, id: str, enabled: bool) -> KeyRecord | None:
        with self._transaction() as connection:
            changed = connection.execute(keys.update().where(keys.c.id == id).values(enabled=enabled))
            return _one(connection, id) if changed.rowcount else None

    def delete(self, id: str) -> bool:
        with self._transaction() as connection:
            return connection.execute(keys.delete().where(keys.c.id == id)).rowcount > 0

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


def _one(connection: sa.Connection, id: str) -> KeyRecord:
    return _record(connection.execute(keys.select().where(keys.c.id == id)).one())


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(**row._mapping)
