"""What the audit log says of the operations on keys."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.errors import NoSuchThing, SetupError, WrongValue
from deepseek_api_compat.security.admin import KeyAdmin, ensure_admin, open_admin
from deepseek_api_compat.store.audit import Actor

BY = Actor("key", "adminadmin22", "req-7")


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[KeyAdmin]:
    admin = open_admin(tmp_path / "data")
    yield admin
    admin.close()


def newest(admin: KeyAdmin) -> dict[str, Any]:
    [entry] = admin.handle("keys.audit", {"limit": 1})
    return dict(entry)


def test_an_entry_says_who_did_what_to_which_key_and_when(admin: KeyAdmin) -> None:
    before = time.time_ns() // 1_000_000
    key = admin.handle("keys.create", {"name": "alice", "limits": {"rps": 5}}, BY)
    entry = newest(admin)
    assert before <= entry["at"] <= time.time_ns() // 1_000_000
    assert entry["actor"] == {"kind": "key", "id": "adminadmin22", "request_id": "req-7"}
    assert (entry["op"], entry["key_id"], entry["key_name"]) == ("keys.create", key["id"], "alice")
    assert entry["changes"]["limits"]["rps"] == 5
    assert "budget" not in entry["changes"], "not given"


def test_without_an_actor_it_is_the_user_of_this_process(admin: KeyAdmin) -> None:
    admin.handle("keys.create", {"name": "alice"})
    assert newest(admin)["actor"] == {"kind": "user", "id": str(os.getuid()), "request_id": None}


def test_the_first_key_is_made_by_the_service(admin: KeyAdmin) -> None:
    ensure_admin(admin)
    assert newest(admin)["actor"]["kind"] == "service"


@pytest.mark.parametrize(
    ("op", "params", "changes"),
    [
        ("keys.update", {"name": "bob", "owner": ""}, {"name": "bob"}),
        ("keys.update", {"budget": "2.5"}, {"budget": "2.5"}),
        ("keys.set_enabled", {"enabled": False}, {"enabled": False}),
        ("keys.set_enabled", {"enabled": True}, {}),
        ("keys.rotate", {}, {}),
        ("keys.delete", {}, {}),
    ],
)
def test_changes_are_what_has_another_value_now(
    admin: KeyAdmin, op: str, params: dict[str, Any], changes: dict[str, Any]
) -> None:
    key = admin.handle("keys.create", {"name": "alice"})["id"]
    admin.handle(op, {"key": key, **params}, BY)
    entry = newest(admin)
    assert (entry["op"], entry["key_id"], entry["actor"]["id"]) == (op, key, BY.id)
    assert entry["changes"] == changes


def test_a_rotation_with_overlap_says_until_when(admin: KeyAdmin) -> None:
    admin.handle("keys.create", {"name": "alice"})
    rotated = admin.handle("keys.rotate", {"key": "alice", "overlap": 60})
    assert newest(admin)["changes"] == {"old_key_until": rotated["old_key_until"]}


def test_a_token_is_noted_by_its_id(admin: KeyAdmin) -> None:
    admin.handle("keys.create", {"name": "alice"})
    made = admin.handle("keys.token", {"key": "alice", "max_tokens": 9})
    changes = {"token_id": made["token_id"], "expires": made["expires"], "max_tokens": 9}
    assert newest(admin)["changes"] == changes


def test_reading_is_not_noted(admin: KeyAdmin) -> None:
    admin.handle("keys.create", {"name": "alice"})
    for op, params in (("keys.list", {}), ("keys.get", {"key": "alice"}), ("keys.audit", {})):
        admin.handle(op, params)
    assert len(admin.handle("keys.audit", {})) == 1


def test_refused_operations_are_not_noted(admin: KeyAdmin) -> None:
    refused: list[tuple[str, dict[str, Any], type[SetupError]]] = [
        ("keys.create", {"name": "", "owner": "x"}, WrongValue),
        ("keys.create", {}, WrongValue),
        ("keys.delete", {"key": "nobody"}, NoSuchThing),
        ("keys.token", {"key": "nobody"}, NoSuchThing),
    ]
    for op, params, error in refused:
        with pytest.raises(error):
            admin.handle(op, params, BY)
    assert admin.handle("keys.audit", {}) == []


def test_no_secret_is_in_the_log(admin: KeyAdmin) -> None:
    created = admin.handle("keys.create", {"name": "alice"})
    rotated = admin.handle("keys.rotate", {"key": "alice", "overlap": 60})
    token = admin.handle("keys.token", {"key": "alice"})["token"]
    text = json.dumps(admin.handle("keys.audit", {}))
    assert created["id"] in text
    for secret in (
        created["api_key"],
        created["secret_key"],
        rotated["api_key"],
        rotated["secret_key"],
        token,
    ):
        assert secret[-20:] not in text


@pytest.mark.parametrize(
    ("op", "params", "field"),
    [
        ("keys.create", {}, "name"),
        ("keys.create", {"name": "a", "limits": {"rps": "fast"}}, "limits.rps"),
        ("keys.create", {"name": "a", "limits": {"speed": 1}}, "limits.speed"),
        ("keys.create", {"name": "a", "colour": 1}, "colour"),
        ("keys.create", {"name": "a", "role": "king"}, "role"),
        ("keys.create", {"name": "a", "expires": 1}, "expires"),
        ("keys.create", {"name": "a", "networks": ["10.0.0.1/8"]}, "networks"),
        ("keys.create", {"name": "a", "budget": "-1"}, "budget"),
        ("keys.rotate", {"key": "a", "overlap": -1}, "overlap"),
        ("keys.audit", {"limit": 0}, "limit"),
        ("keys.token", {"key": "a", "colour": 1}, "colour"),
    ],
)
def test_a_wrong_parameter_is_named(admin: KeyAdmin, op: str, params: dict[str, Any], field: str) -> None:
    with pytest.raises(WrongValue) as caught:
        admin.handle(op, params)
    assert caught.value.field == field
