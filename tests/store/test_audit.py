"""The audit log: written with the change it tells of, and never changed itself."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store.audit import Actor, AuditEntry
from deepseek_api_compat.store.base import KeyRecord
from deepseek_api_compat.store.sql import DATABASE, SqlStore, open_store

RECORD = KeyRecord(id="a", name="alice", role="user", hash=bytes(32), created=1)
ENTRY = AuditEntry(
    at=1_700_000_000_123,
    actor=Actor("key", "adminadmin22", "req-1"),
    op="keys.update",
    key_id="a",
    key_name="alice",
    changes={"models": ["小模型"], "limits": {"rps": 0.5}, "budget": None},
)


def note(record: KeyRecord) -> AuditEntry:
    return msgspec.structs.replace(ENTRY, key_id=record.id, key_name=record.name)


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    url = None if request.param == "sqlite" else request.getfixturevalue("postgresql_url")
    store = open_store(tmp_path, url)
    yield store
    store.close()


def test_entries_come_back_as_they_were_newest_first(store: SqlStore) -> None:
    second = msgspec.structs.replace(ENTRY, actor=Actor("user", "1000"), op="keys.delete", changes={})
    store.note(ENTRY)
    store.note(second)
    newest, oldest = store.audit(10)
    assert oldest == msgspec.structs.replace(ENTRY, number=oldest.number)
    assert newest == msgspec.structs.replace(second, number=newest.number)
    assert newest.number > oldest.number


def test_pages_follow_one_another(store: SqlStore) -> None:
    for at in range(5):
        store.note(msgspec.structs.replace(ENTRY, at=at))
    first = store.audit(2)
    second = store.audit(2, before=first[-1].number)
    last = store.audit(2, before=second[-1].number)
    assert [entry.at for entry in (*first, *second, *last)] == [4, 3, 2, 1, 0]


def test_each_change_takes_its_note_along(store: SqlStore) -> None:
    store.create(RECORD, note)
    store.update("a", {"name": "bob"}, note)
    store.rotate("a", b"b" * 32, 5, note)
    store.delete("a", msgspec.structs.replace(ENTRY, op="keys.delete"))
    assert [entry.key_name for entry in reversed(store.audit(10))] == ["alice", "bob", "bob", "alice"]


def test_what_did_not_happen_is_not_noted(store: SqlStore) -> None:
    assert store.update("nobody", {"name": "bob"}, note) is None
    assert store.rotate("nobody", bytes(32), 5, note) is None
    assert not store.delete("nobody", ENTRY)
    store.create(RECORD)
    with pytest.raises(SetupError):
        store.create(RECORD, note)
    assert store.audit(10) == []


def test_what_can_not_be_noted_does_not_happen(store: SqlStore) -> None:
    def failing(record: KeyRecord) -> AuditEntry:
        raise RuntimeError("no note")

    store.create(RECORD)
    with pytest.raises(RuntimeError):
        store.update("a", {"name": "bob"}, failing)
    with pytest.raises(RuntimeError):
        store.create(msgspec.structs.replace(RECORD, id="b"), failing)
    assert [(key.id, key.name) for key in store.list()] == [("a", "alice")]


@pytest.mark.parametrize("statement", ["UPDATE audit SET op = 'nothing'", "DELETE FROM audit"])
def test_the_database_refuses_to_change_an_entry(store: SqlStore, statement: str) -> None:
    store.note(ENTRY)
    with pytest.raises(sa.exc.DBAPIError, match="can only be added to"), store._engine.begin() as connection:
        connection.exec_driver_sql(statement)
    assert len(store.audit(10)) == 1


def test_a_backup_has_the_log_and_guards_it(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    store.note(ENTRY)
    store.copy_to(tmp_path / "copy.db")
    store.close()
    with closing(sqlite3.connect(tmp_path / "copy.db")) as connection:
        assert connection.execute("SELECT op FROM audit").fetchall() == [("keys.update",)]
        with pytest.raises(sqlite3.IntegrityError, match="can only be added to"):
            connection.execute("DELETE FROM audit")


def test_writers_in_several_processes_note_every_change(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    program = (
        "import pathlib, sys\n"
        "from deepseek_api_compat.security.admin import open_admin\n"
        "admin = open_admin(pathlib.Path(sys.argv[1]))\n"
        "for number in range(20):\n"
        "    admin.handle('keys.create', {'name': f'{sys.argv[2]}-{number}'})\n"
        "    admin.handle('keys.delete', {'key': f'{sys.argv[2]}-{number}'})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", program, tmp_path, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    store = open_store(tmp_path)
    noted = {(entry.op, entry.key_name) for entry in store.audit(1000)}
    store.close()
    assert (tmp_path / DATABASE).exists()
    assert noted == {
        (f"keys.{done}", f"{name}-{number}")
        for done in ("create", "delete")
        for name in "abc"
        for number in range(20)
    }
