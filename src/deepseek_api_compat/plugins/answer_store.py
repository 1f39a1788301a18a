"""Answers in an SQLite file that all workers of a machine share: bounded, and oldest use goes first."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path

FILE = "answers.sqlite"
BUSY = 1.0  # seconds to wait for another worker
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    key BLOB PRIMARY KEY,
    expires REAL NOT NULL,
    used REAL NOT NULL,
    size INTEGER NOT NULL,
    answer BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS answers_used ON answers (used, size);
CREATE INDEX IF NOT EXISTS answers_expires ON answers (expires);
"""


class AnswerStore:
    """Called from any thread. Everything raises sqlite3.Error or OSError for a file that can't be used."""

    def __init__(
        self, ttl: float, max_entries: int, max_bytes: int, clock: Callable[[], float] = time.time
    ) -> None:
        """ttl: seconds. max_bytes: of the answers; the file is a little larger."""
        self._ttl = ttl
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._clock = clock
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._inode = 0

    def get(self, folder: Path, key: bytes) -> bytes | None:
        """The answer, if there is one that is not too old."""
        now = self._clock()
        with self._lock:
            connection = self._open(folder)
            row = connection.execute(
                "SELECT answer FROM answers WHERE key = ? AND expires > ?", (key, now)
            ).fetchone()
            if row is None:
                return None
            connection.execute("UPDATE answers SET used = ? WHERE key = ?", (now, key))
        return bytes(row[0])

    def put(self, folder: Path, key: bytes, answer: bytes) -> None:
        """Keep it, at the cost of those that are too old or were not used for longest."""
        if len(answer) > self._max_bytes:
            return
        now = self._clock()
        row = (key, now + self._ttl, now, len(answer), answer)
        with self._lock:
            connection = self._open(folder)
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, ?)", row)
                connection.execute("DELETE FROM answers WHERE expires <= ?", (now,))
                self._shrink(connection)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def close(self) -> None:
        with self._lock:
            self._close()

    def _shrink(self, connection: sqlite3.Connection) -> None:
        entries, size = connection.execute("SELECT count(*), sum(size) FROM answers").fetchone()
        longest_unused = connection.execute("SELECT rowid, size FROM answers ORDER BY used")
        going: list[tuple[int]] = []
        while entries - len(going) > self._max_entries or size > self._max_bytes:
            row, row_size = longest_unused.fetchone()
            going.append((row,))
            size -= row_size
        longest_unused.close()
        connection.executemany("DELETE FROM answers WHERE rowid = ?", going)

    def _open(self, folder: Path) -> sqlite3.Connection:
        """The open file; another one if somebody deleted it, which empties the cache."""
        path = folder / FILE
        if self._connection is not None:
            try:
                if path.stat().st_ino == self._inode:
                    return self._connection
            except FileNotFoundError:
                pass
            self._close()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(path, timeout=BUSY, isolation_level=None, check_same_thread=False)
        try:
            _prepare(connection)
        except BaseException:
            connection.close()
            raise
        self._connection, self._inode = connection, path.stat().st_ino
        return connection

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


def _prepare(connection: sqlite3.Connection) -> None:
    """Make the file what it should be, which others may do at the same time."""
    deadline = time.monotonic() + BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("PRAGMA secure_delete = ON")  # nothing of what is deleted stays in the file
            connection.executescript(_SCHEMA)
            return
        except sqlite3.OperationalError:
            # SQLite does not wait for another that changes the journal's mode, whatever its timeout.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
