"""The contract of a KeyStore, for every implementation."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.store.base import KeyRecord, KeyStore
from deepseek_api_compat.store.sql import open_store


@pytest.fixture(params=["sqlite", "url"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KeyStore]:
    url = None if request.param == "sqlite" else f"sqlite:///{tmp_path}/elsewhere.db"
    store = open_store(tmp_path, url)
    yield store
    store.close()


def record(id: str, **fields: object) -> KeyRecord:
    values = {"name": "alice", "role": "user", "hash": bytes(range(32)), "created": 1_700_000_000, **fields}
    return KeyRecord(id=id, **values)


def test_a_new_store_is_empty(store: KeyStore) -> None:
    assert store.list() == []
    assert store.get("a") is None


def test_a_created_key_comes_back_as_it_was(store: KeyStore) -> None:
    made = store.create(record("a", role="metrics", rps=2.5, version=3, enabled=False))
    assert made == record("a", role="metrics", rps=2.5, version=3, enabled=False, slot=0)
    assert store.get("a") == made
    assert store.list() == [made]


@pytest.mark.parametrize("rps", [None, 0.0, 100.0])
def test_no_rate_and_the_default_rate_stay_apart(store: KeyStore, rps: float | None) -> None:
    store.create(record("a", rps=rps))
    found = store.get("a")
    assert found is not None
    assert found.rps == rps


def test_names_need_not_be_unique(store: KeyStore) -> None:
    store.create(record("a"))
    store.create(record("b"))
    assert [key.id for key in store.list()] == ["a", "b"]


def test_the_oldest_key_is_listed_first(store: KeyStore) -> None:
    store.create(record("new", created=2))
    store.create(record("old", created=1))
    assert [key.id for key in store.list()] == ["old", "new"]


def test_disable_and_enable(store: KeyStore) -> None:
    made = store.create(record("a"))
    store.create(record("b"))
    disabled = store.set_enabled("a", False)
    assert disabled is not None
    assert not disabled.enabled
    assert store.get("a") == disabled
    assert [key.enabled for key in store.list()] == [False, True]
    assert store.set_enabled("a", True) == made


def test_delete(store: KeyStore) -> None:
    store.create(record("a"))
    assert store.delete("a")
    assert store.get("a") is None


def test_changing_what_is_not_there_says_so(store: KeyStore) -> None:
    assert store.set_enabled("a", False) is None
    assert store.delete("a") is False


def test_a_slot_is_the_lowest_free_one_and_stays(store: KeyStore) -> None:
    assert [store.create(record(id)).slot for id in "abcd"] == [0, 1, 2, 3]
    store.delete("a")
    store.delete("c")
    assert [store.create(record(id)).slot for id in "efg"] == [0, 2, 4]
    assert {key.id: key.slot for key in store.list()} == {"b": 1, "d": 3, "e": 0, "f": 2, "g": 4}


def test_keys_survive_reopening(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    made = first.create(record("a"))
    first.close()
    second = open_store(tmp_path)
    assert second.list() == [made]
    second.close()
