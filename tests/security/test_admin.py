from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.security.admin import KeyAdmin, ensure_admin, open_admin
from deepseek_api_compat.security.keys import KeyTable, secret_key
from deepseek_api_compat.security.master import FILE_NAME


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[KeyAdmin]:
    admin = open_admin(tmp_path / "data")
    yield admin
    admin.close()


def create(admin: KeyAdmin, name: str = "alice", **params: Any) -> dict[str, Any]:
    created: dict[str, Any] = admin.handle("keys.create", {"name": name, **params})
    return created


def test_a_created_key_authenticates(admin: KeyAdmin) -> None:
    created = create(admin, role="metrics", rps=0)
    table = KeyTable(admin.store.list(), admin.master)
    principal = table.authenticate(f"Bearer {created['api_key']}".encode())
    assert (principal.id, principal.name) == (created["id"], "alice")
    assert (principal.role, principal.limits.rps) == ("metrics", 0)
    assert created["secret_key"] == secret_key(admin.master, created["id"], 1)


def test_the_plain_key_is_nowhere_in_the_data_directory(admin: KeyAdmin, tmp_path: Path) -> None:
    created = create(admin)
    admin.handle("keys.set_enabled", {"key": "alice", "enabled": False})

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}

    while_open = content()
    admin.close()
    for files in (while_open, content()):
        assert any(created["id"].encode() in data for data in files.values())  # the search works
        for secret in (created["api_key"], created["api_key"][17:], created["secret_key"]):
            for data in files.values():
                assert secret.encode() not in data
                assert bytes(secret, "utf-16-le") not in data


def test_list_shows_everything_but_secrets(admin: KeyAdmin) -> None:
    created = create(admin, rps=2.5)
    (listed,) = admin.handle("keys.list", {})
    assert listed.pop("created") > 1_700_000_000
    assert listed == {"id": created["id"], "name": "alice", "role": "user", "rps": 2.5, "enabled": True}


@pytest.mark.parametrize("by", ["id", "name"])
def test_disable_enable_and_delete(admin: KeyAdmin, by: str) -> None:
    create(admin, "other")
    key = create(admin)[by]
    assert admin.handle("keys.set_enabled", {"key": key, "enabled": False})["enabled"] is False
    assert [listed["enabled"] for listed in admin.handle("keys.list", {})] == [True, False]
    assert admin.handle("keys.set_enabled", {"key": key, "enabled": True})["enabled"] is True
    assert admin.handle("keys.delete", {"key": key})["name"] == "alice"
    assert [listed["name"] for listed in admin.handle("keys.list", {})] == ["other"]


def test_an_ambiguous_name_is_refused_with_the_ids(admin: KeyAdmin) -> None:
    ids = [create(admin)["id"] for _ in range(2)]
    with pytest.raises(SetupError, match="2 keys are named 'alice'") as caught:
        admin.handle("keys.delete", {"key": "alice"})
    assert all(id in str(caught.value) for id in ids)
    admin.handle("keys.delete", {"key": ids[0]})
    assert [listed["id"] for listed in admin.handle("keys.list", {})] == ids[1:]


@pytest.mark.parametrize(
    ("op", "params", "sentence"),
    [
        ("keys.steal", {}, "There is no operation 'keys.steal'."),
        ("keys.create", {}, "Wrong parameters for keys.create: missing a required argument: 'name'."),
        ("keys.list", {"all": True}, "Wrong parameters for keys.list"),
        ("keys.create", {"name": ""}, "1 to 100 printable characters"),
        ("keys.create", {"name": "a\nb"}, "1 to 100 printable characters"),
        ("keys.create", {"name": "n" * 101}, "1 to 100 printable characters"),
        ("keys.create", {"name": 7}, "1 to 100 printable characters"),
        ("keys.create", {"name": "a", "role": "root"}, "must be one of user, admin, metrics, not 'root'"),
        ("keys.create", {"name": "a", "rps": -1}, "must be a number of requests per second"),
        ("keys.create", {"name": "a", "rps": float("nan")}, "must be a number of requests per second"),
        ("keys.create", {"name": "a", "rps": float("inf")}, "must be a number of requests per second"),
        ("keys.create", {"name": "a", "rps": 10**400}, "must be a number of requests per second"),
        ("keys.create", {"name": "a", "rps": "5"}, "must be a number of requests per second"),
        ("keys.delete", {"key": "nobody"}, "There is no key with the id or name 'nobody'."),
        ("keys.delete", {"key": None}, "There is no key with the id or name None."),
        ("keys.set_enabled", {"key": "x", "enabled": True}, "There is no key with the id or name 'x'."),
    ],
)
def test_a_wrong_request_is_refused(admin: KeyAdmin, op: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SetupError) as caught:
        admin.handle(op, params)
    assert sentence in str(caught.value)
    assert admin.handle("keys.list", {}) == []


def test_the_first_start_makes_one_admin_key(admin: KeyAdmin) -> None:
    key = ensure_admin(admin)
    assert key is not None
    principal = KeyTable(admin.store.list(), admin.master).authenticate(f"Bearer {key}".encode())
    assert (principal.name, principal.role, principal.limits.rps) == ("admin", "admin", None)
    assert ensure_admin(admin) is None
    assert len(admin.store.list()) == 1


def test_keys_without_their_master_key_are_refused(admin: KeyAdmin, tmp_path: Path) -> None:
    create(admin)
    (tmp_path / "data" / FILE_NAME).unlink()
    with pytest.raises(SetupError, match="is missing"):
        open_admin(tmp_path / "data")
