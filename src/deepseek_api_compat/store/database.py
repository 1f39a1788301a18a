"""Opening a SQL database: an SQLite file in the data directory, or whatever a URL names.

Alembic owns the schemas. Importing it costs more than everything else a start does here, so it is imported
only when a database is not at the newest revision.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.datadir import reason

BUSY_TIMEOUT = 10.0  # seconds that a writer waits for another process


class Schema(NamedTuple):
    """What a database must look like: the newest revision, the table that keeps the revision, and the
    package whose `upgrade(connection)` brings an older schema there."""

    head: str
    version_table: str
    migrations: str


def open_database(data_dir: Path, file: str, url: str | None, schema: Schema) -> sa.Engine:
    """Open the database `file` in `data_dir`, or the one that the SQLAlchemy URL names, at its newest schema.

    `data_dir` must exist. A new file is readable by its owner only. Raises SetupError.
    """
    engine = _engine(url) if url else _sqlite(data_dir / file)
    try:
        with _locked(data_dir), one_sentence(engine):
            if _revision(engine, schema) != schema.head:
                _upgrade(engine, schema)
    except BaseException:
        engine.dispose()
        raise
    return engine


def _engine(url: str) -> sa.Engine:
    try:
        return sa.create_engine(url)
    except ModuleNotFoundError as error:
        raise SetupError(f"The database URL needs the package {error.name}; see docs/ledger.md.") from None
    except sa.exc.ArgumentError:
        raise SetupError(
            "The database URL can't be read; it looks like postgresql+psycopg://USER@HOST/NAME."
        ) from None


def make_private(path: Path) -> None:
    """Make an empty file that only its owner can read, unless there is one. Raises SetupError."""
    try:
        # The -wal and -shm files inherit this mode. Never reopened if it exists: closing a second descriptor
        # would drop the locks that this process has on the database.
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except FileExistsError:
        pass
    except OSError as error:
        raise SetupError(f"Can't create the database {path}: {reason(error)}.") from None


def _sqlite(path: Path) -> sa.Engine:
    make_private(path)
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


def _revision(engine: sa.Engine, schema: Schema) -> str | None:
    with engine.connect() as connection:
        if not sa.inspect(connection).has_table(schema.version_table):
            return None
        version = sa.table(schema.version_table, sa.column("version_num", sa.String))
        return connection.execute(sa.select(version.c.version_num)).scalar()


def _upgrade(engine: sa.Engine, schema: Schema) -> None:
    migrations = import_module(schema.migrations)
    if engine.dialect.name == "sqlite":
        connection = engine.raw_connection()
        try:
            # Not allowed in a transaction; the file remembers it.
            connection.cursor().execute("PRAGMA journal_mode=WAL")
        finally:
            connection.close()
    with engine.begin() as transaction:
        migrations.upgrade(transaction)


@contextmanager
def one_sentence(engine: sa.Engine) -> Iterator[None]:
    """Turn every fault of the database into a SetupError of one sentence, without the URL's password."""
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
