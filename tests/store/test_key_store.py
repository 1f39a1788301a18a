"""The contract of a KeyStore, for every implementation."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from deepseek_api_compat.store.base import CHANGEABLE, KeyLimits, KeyRecord, KeyStore
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


FULL = record(
    "a",
    role="metrics",
    version=3,
    owner="Ops <ops@example.com>",
    enabled=False,
    expires=1_900_000_000,
    models=("deepseek-v3", "小模型"),
    networks=("10.0.0.0/8", "2001:db8::/32"),
    limits=KeyLimits(rps=2.5, burst=10, rpm=100, tpm=2**40, tpd=2**53, concurrency=8),
    budget=2**53,
    old_hash=bytes(32),
    old_version=2,
    old_until=1_800_000_000,
    slot=0,
)


def test_a_created_key_comes_back_as_it_was(store: KeyStore) -> None:
    assert all(getattr(FULL, field) is not None for field in FULL.__struct_fields__)
    assert store.create(FULL) == FULL
    assert store.get("a") == FULL
    assert store.list() == [FULL]


@pytest.mark.parametrize("limit", KeyLimits.__struct_fields__)
@pytest.mark.parametrize("value", [None, 0, 100])
def test_no_limit_and_the_default_limit_stay_apart(store: KeyStore, limit: str, value: int | None) -> None:
    limits = KeyLimits(**{limit: value})
    assert store.create(record("a", limits=limits)).limits == limits


@pytest.mark.parametrize("field", ["models", "networks"])
def test_an_empty_list_is_not_everything(store: KeyStore, field: str) -> None:
    assert getattr(store.create(record("a", **{field: ()})), field) == ()


def test_names_need_not_be_unique(store: KeyStore) -> None:
    store.create(record("a"))
    store.create(record("b"))
    assert [key.id for key in store.list()] == ["a", "b"]


def test_the_oldest_key_is_listed_first(store: KeyStore) -> None:
    store.create(record("new", created=2))
    store.create(record("old", created=1))
    assert [key.id for key in store.list()] == ["old", "new"]


def test_update_changes_what_it_is_told_and_no_more(store: KeyStore) -> None:
    made = store.create(FULL)
    other = store.create(record("b"))
    changes = {
        "name": "bob",
        "role": "user",
        "owner": "",
        "enabled": True,
        "expires": None,
        "models": None,
        "networks": ("::1/128",),
        "budget": 0,
    }
    limits = {"rps": 0.0, "burst": None, "rpm": 1, "tpm": 2, "tpd": 3, "concurrency": 4}
    assert set(changes) | set(limits) == CHANGEABLE
    changed = store.update("a", {**changes, **limits})
    assert changed == msgspec.structs.replace(made, **changes, limits=KeyLimits(**limits))
    assert [store.get(id) for id in "ab"] == [changed, other]
    assert store.update("a", {"rpm": 7}) == msgspec.structs.replace(
        changed, limits=KeyLimits(**{**limits, "rpm": 7})
    )


def test_an_update_of_nothing_returns_the_key(store: KeyStore) -> None:
    assert store.update("a", {}) is None
    assert store.update(store.create(FULL).id, {}) == FULL


@pytest.mark.parametrize("field", ["id", "hash", "version", "created", "slot", "old_hash", "limits", "typo"])
def test_what_may_not_change_is_a_bug_of_the_caller(store: KeyStore, field: str) -> None:
    made = store.create(FULL)
    with pytest.raises(ValueError, match=field):
        store.update("a", {field: 1})
    assert store.get("a") == made


def test_rotation_keeps_the_last_key_for_a_while(store: KeyStore) -> None:
    made = store.create(record("a", networks=("::1/128",)))
    once = store.rotate("a", b"1" * 32, 1_800_000_000)
    assert once == msgspec.structs.replace(
        made, hash=b"1" * 32, version=2, old_hash=made.hash, old_version=1, old_until=1_800_000_000
    )
    twice = store.rotate("a", b"2" * 32, 0)
    assert twice == msgspec.structs.replace(
        once, hash=b"2" * 32, version=3, old_hash=b"1" * 32, old_version=2, old_until=0
    )
    assert store.list() == [twice]


def test_the_master_keys_id_is_noted_once(store: KeyStore) -> None:
    assert store.master_id() is None
    store.set_master_id("one")
    store.set_master_id("other")
    assert store.master_id() == "other"


def test_delete(store: KeyStore) -> None:
    store.create(record("a"))
    assert store.delete("a")
    assert store.get("a") is None


def test_changing_what_is_not_there_says_so(store: KeyStore) -> None:
    assert store.update("a", {"enabled": False}) is None
    assert store.rotate("a", bytes(32), 0) is None
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
