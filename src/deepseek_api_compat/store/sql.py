"""Keys in SQL: SQLite in WAL mode in the data directory, or any database that a URL names.

Alembic owns the schema. Importing it costs more than everything else a start does here, so it is imported
only when the database is not at `HEAD`.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.base import KeyRecord
from deepseek_api_compat.store.datadir import reason

DATABASE = "deepseek.db"
HEAD = "0001"
BUSY_TIMEOUT = 10.0  # seconds that a writer waits for another process

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
        with _one_sentence(self._engine), self._engine.begin() as connection:
            yield connection


def open_store(data_dir: Path, url: str | None = None) -> SqlStore:
    """Open the store, and make or upgrade its schema where needed. `data_dir` must exist. Raises SetupError.

    `url` is an SQLAlchemy URL; without it the store is `DATABASE` in `data_dir`, readable by its owner only.
    """
    engine = sa.create_engine(url) if url else _sqlite(data_dir / DATABASE)
    try:
        with _locked(data_dir), _one_sentence(engine):
            if _revision(engine) != HEAD:
                _upgrade(engine)
    except BaseException:
        engine.dispose()
        raise
    return SqlStore(engine)


def _sqlite(path: Path) -> sa.Engine:
    try:
        # The -wal and -shm files inherit this mode. Never reopened if it exists: closing a second descriptor
        # would drop the locks that this process has on the database.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise SetupError(f"Can't create the database {path}: {reason(error)}.") from None
    engine = sa.create_engine(
        sa.URL.create("sqlite", database=str(path)),
        connect_args={"timeout": BUSY_TIMEOUT, "isolation_level": None},
    )
    # The driver begins no transaction before DDL, and a half-made schema could never be opened again.
    sa.event.listen(engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN"))
    return engine


@contextmanager
def _locked(data_dir: Path) -> Iterator[None]:
    """One process at a time looks at the schema and changes it."""
    with ExitStack() as stack:
        try:
            descriptor = os.open(data_dir, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            raise SetupError(f"Can't lock the data directory {data_dir}: {reason(error)}.") from None
        yield


def _revision(engine: sa.Engine) -> str | None:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table("alembic_version"):
            return None
        return connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalar()


def _upgrade(engine: sa.Engine) -> None:
    from deepseek_api_compat.store.migrations import upgrade

    if engine.dialect.name == "sqlite":
        connection = engine.raw_connection()
        try:
            # Not allowed in a transaction; the file remembers it.
            connection.cursor().execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    with engine.begin() as transaction:
        upgrade(transaction)


@contextmanager
def _one_sentence(engine: sa.Engine) -> Iterator[None]:
    try:
        yield
    except (DBAPIError, sqlite3.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        where = engine.url.database if engine.dialect.name == "sqlite" else engine.url.render_as_string()
        raise SetupError(f"The database {where} {_fault(str(cause))}.") from None


_FAULTS = {
    "is full": "can't grow: no space left on the disk",
    "readonly": "can't be written: permission denied",
    "unable to open": "can't be opened: permission denied, or the disk is full",
    "not a database": "is damaged: restore it from a backup, or remove it to begin anew",
    "malformed": "is damaged: restore it from a backup, or remove it to begin anew",
    "locked": "is busy: another process has been writing to it for too long",
}


def _fault(message: str) -> str:
    """What SQLite's message means to an operator; another message as it is, in one line."""
    known = (sentence for part, sentence in _FAULTS.items() if part in message)
    return next(known, "failed: " + " ".join(message.split()).rstrip("."))


def _one(connection: sa.Connection, id: str) -> KeyRecord:
    return _record(connection.execute(keys.select().where(keys.c.id == id)).one())


def _record(row: sa.Row[tuple[object, ...]]) -> KeyRecord:
    return KeyRecord(**row._mapping)
