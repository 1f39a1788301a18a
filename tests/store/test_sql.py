"""What is particular to SQL: files, schema, several processes, and broken disks."""

import resource
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store import migrations
from deepseek_api_compat.store.base import KeyLimits, KeyRecord
from deepseek_api_compat.store.sql import DATABASE, HEAD, metadata, open_store

RECORD = KeyRecord(id="a", name="alice", role="user", hash=bytes(32), created=1)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """Writing a file beyond `size` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_head_is_the_newest_migration() -> None:
    assert ScriptDirectory.from_config(migrations.config()).get_current_head() == HEAD


def test_migrations_make_the_schema_that_the_code_uses(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    engine = sa.create_engine(f"sqlite:///{tmp_path / DATABASE}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


OLD = [
    ("a", "alice", "user", bytes(32), 2, 2.5, 1, 1_700_000_000, 4),
    ("b", "", "admin", b"b" * 32, 1, None, 0, 1, 0),
]


@pytest.fixture
def first_version(tmp_path: Path) -> Path:
    """A database as version 0.1 left it, with two keys."""
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute(
            "CREATE TABLE keys (id VARCHAR(12) NOT NULL, name VARCHAR(100) NOT NULL,"
            " role VARCHAR(16) NOT NULL, hash BLOB NOT NULL, version INTEGER NOT NULL, rps FLOAT,"
            " enabled BOOLEAN NOT NULL, created BIGINT NOT NULL, slot INTEGER NOT NULL,"
            " PRIMARY KEY (id), UNIQUE (slot))"
        )
        connection.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)")
        connection.execute("INSERT INTO alembic_version VALUES ('0001')")
        connection.executemany(f"INSERT INTO keys VALUES ({','.join('?' * 9)})", OLD)
    connection.close()
    return tmp_path


def test_keys_of_the_first_version_stay_what_they_were(first_version: Path) -> None:
    store = open_store(first_version)
    assert store.list() == [
        KeyRecord(id="b", name="", role="admin", hash=b"b" * 32, enabled=False, created=1, slot=0),
        KeyRecord(
            id="a",
            name="alice",
            role="user",
            hash=bytes(32),
            version=2,
            limits=KeyLimits(rps=2.5),
            created=1_700_000_000,
            slot=4,
        ),
    ]
    assert store.create(msgspec.structs.replace(RECORD, id="c", budget=5)).budget == 5
    store.close()
    engine = sa.create_engine(f"sqlite:///{first_version / DATABASE}")
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_an_interrupted_upgrade_leaves_the_first_version(
    first_version: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_upgrade = migrations.upgrade

    def interrupted(connection: sa.Connection) -> None:
        real_upgrade(connection)
        raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "upgrade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store(first_version)
    monkeypatch.undo()
    connection = sqlite3.connect(first_version / DATABASE)
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
    assert connection.execute("SELECT * FROM keys").fetchall() == OLD
    connection.close()
    store = open_store(first_version)
    assert len(store.list()) == 2
    store.close()


def test_processes_that_start_at_the_same_time_upgrade_once(first_version: Path) -> None:
    program = (
        "import sys, pathlib; from deepseek_api_compat.store.sql import open_store\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "print([key.id for key in open_store(pathlib.Path(sys.argv[1])).list()])"
    )
    openers = [
        subprocess.Popen(
            [sys.executable, "-c", program, first_version],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for opener in openers:
        assert opener.stdout is not None
        assert opener.stdout.readline() == "ready\n"
    for opener in openers:
        assert opener.stdin is not None
        opener.stdin.write("go\n")
        opener.stdin.flush()
    assert [opener.communicate(timeout=20)[0] for opener in openers] == ["['b', 'a']\n"] * 3


def test_the_database_is_in_wal_mode_and_private(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(RECORD)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    store.close()
    assert modes == {DATABASE: 0o600, f"{DATABASE}-wal": 0o600, f"{DATABASE}-shm": 0o600}


def test_an_up_to_date_database_is_opened_without_alembic(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    program = (
        "import sys, pathlib; from deepseek_api_compat.store.sql import open_store\n"
        "open_store(pathlib.Path(sys.argv[1])).close()\n"
        "print('alembic' in sys.modules)"
    )
    output = subprocess.check_output([sys.executable, "-c", program, tmp_path], text=True)
    assert output.split() == ["False"]


def test_a_database_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    with sqlite3.connect(tmp_path / DATABASE) as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(SetupError, match=f"{DATABASE} is of a newer version of this program"):
        open_store(tmp_path)


@pytest.mark.parametrize("content", [b"no database\n" * 1000, b"SQLite format 3\0" + b"\xff" * 8000])
def test_a_damaged_database_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    (tmp_path / DATABASE).write_bytes(content)
    with pytest.raises(SetupError, match=f"{DATABASE} is damaged: restore it"):
        open_store(tmp_path)
    assert (tmp_path / DATABASE).read_bytes() == content


def test_a_database_that_is_a_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / DATABASE).mkdir()
    with pytest.raises(SetupError, match="can't be opened"):
        open_store(tmp_path)


@pytest.mark.parametrize("size", [0, 4096, 20_480])
def test_a_full_disk_leaves_nothing_half_made(tmp_path: Path, size: int) -> None:
    with files_limited_to(size), pytest.raises(SetupError, match=DATABASE):
        open_store(tmp_path)
    store = open_store(tmp_path)
    assert store.create(RECORD).slot == 0
    store.close()


def test_an_interrupted_migration_leaves_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_upgrade = migrations.upgrade

    def interrupted(connection: sa.Connection) -> None:
        real_upgrade(connection)
        raise KeyboardInterrupt

    monkeypatch.setattr(migrations, "upgrade", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_store(tmp_path)
    connection = sqlite3.connect(tmp_path / DATABASE)
    assert connection.execute("SELECT name FROM sqlite_master").fetchall() == []
    connection.close()


def test_one_process_migrates_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_upgrade = migrations.upgrade
    refused: list[bool] = []

    def upgrade(connection: sa.Connection) -> None:
        program = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], 0), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        other = subprocess.run([sys.executable, "-c", program, tmp_path], stderr=subprocess.PIPE, text=True)
        refused.append("BlockingIOError" in other.stderr)
        real_upgrade(connection)

    monkeypatch.setattr(migrations, "upgrade", upgrade)
    open_store(tmp_path).close()
    assert refused == [True]


def test_a_disk_that_fills_up_refuses_the_key_and_keeps_the_rest(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.create(RECORD)
    store.close()
    store = open_store(tmp_path)
    with files_limited_to(0), pytest.raises(SetupError, match=DATABASE):
        store.create(KeyRecord(id="b", name="bob", role="user", hash=bytes(32), created=2))
    assert [key.id for key in store.list()] == ["a"]
    store.close()


def test_a_full_database_says_that_there_is_no_space(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store._engine.dispose()
    sa.event.listen(store._engine, "connect", lambda raw, _: raw.execute("PRAGMA max_page_count = 1"))

    def fill() -> None:
        for number in range(1000):
            store.create(KeyRecord(id=str(number), name="n" * 100, role="user", hash=bytes(32), created=1))

    with pytest.raises(SetupError, match=r"can't grow: no space left on the disk\.$"):
        fill()
    store.close()


RACER = """
import sys, pathlib
from deepseek_api_compat.security.admin import open_admin
print("ready", flush=True)
sys.stdin.readline()
admin = open_admin(pathlib.Path(sys.argv[1]))
for _ in range(5):
    print(admin.handle("keys.create", {"name": "racer"})["api_key"])
admin.close()
"""


def test_processes_that_start_at_the_same_time_share_one_database(tmp_path: Path) -> None:
    from deepseek_api_compat.security.admin import open_admin
    from deepseek_api_compat.security.keys import KeyTable

    command = [sys.executable, "-c", RACER, tmp_path / "data"]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    keys = [key for racer in racers for key in racer.communicate(timeout=20)[0].split()]
    assert [racer.returncode for racer in racers] == [0, 0, 0]

    admin = open_admin(tmp_path / "data")
    records = admin.store.list()
    table = KeyTable(records, admin.master)
    admin.close()
    assert sorted(record.slot for record in records) == list(range(15))
    assert len({table.authenticate(b"Bearer " + key.encode()).id for key in keys}) == 15
