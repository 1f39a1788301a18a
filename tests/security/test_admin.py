import hashlib
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.errors import AuthenticationFailed, SetupError
from deepseek_api_compat.security import keys
from deepseek_api_compat.security.admin import READ_ONLY, KeyAdmin, backup_keys, ensure_admin, open_admin
from deepseek_api_compat.security.keys import KeyTable, Principal, secret_key
from deepseek_api_compat.security.master import FILE_NAME, master_id
from deepseek_api_compat.store.sql import DATABASE


@pytest.fixture
def admin(tmp_path: Path) -> Iterator[KeyAdmin]:
    admin = open_admin(tmp_path / "data")
    yield admin
    admin.close()


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KeyAdmin]:
    """Keys that stay none: for what must be refused."""
    admin = open_admin(tmp_path_factory.mktemp("empty"))
    yield admin
    admin.close()


def create(admin: KeyAdmin, name: str = "alice", **params: Any) -> dict[str, Any]:
    created: dict[str, Any] = admin.handle("keys.create", {"name": name, **params})
    return created


def principal_of(admin: KeyAdmin, key_or_token: str, now: float | None = None) -> Principal:
    return KeyTable(admin.store.list(), admin.master).authenticate_key(key_or_token.encode(), now)


def test_a_created_key_authenticates(admin: KeyAdmin) -> None:
    created = create(admin, role="metrics", limits={"rps": 0})
    principal = principal_of(admin, created["api_key"])
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


LATER = int(time.time()) + 1000
NO_LIMITS = dict.fromkeys(("rps", "burst", "rpm", "tpm", "tpd", "concurrency"))
ALL_FIELDS: dict[str, Any] = {
    "role": "admin",
    "owner": "Ops <ops@example.com>",
    "enabled": False,
    "expires": LATER,
    "models": ["deepseek-v3", "b"],
    "networks": ["10.0.0.0/8", "::1/128"],
    "limits": {"rps": 0.5, "burst": 1, "rpm": 2, "tpm": 3, "tpd": 4, "concurrency": 5},
    "budget": "12.5",
}
NO_FIELDS: dict[str, Any] = {
    "role": "user",
    "owner": "",
    "enabled": True,
    "expires": None,
    "models": None,
    "networks": None,
    "limits": NO_LIMITS,
    "budget": None,
}


@pytest.mark.parametrize("fields", [{}, ALL_FIELDS])
def test_a_key_is_shown_with_everything_but_its_secrets(admin: KeyAdmin, fields: dict[str, Any]) -> None:
    created = create(admin, **fields)
    assert set(created) - set(admin.handle("keys.get", {"key": "alice"})) == {"api_key", "secret_key"}
    (listed,) = admin.handle("keys.list", {})
    assert listed == admin.handle("keys.get", {"key": created["id"]})
    assert listed.pop("created") > 1_700_000_000
    assert listed == {"id": created["id"], "name": "alice", **NO_FIELDS, **fields, "old_key_until": None}


@pytest.mark.parametrize("field", [*ALL_FIELDS, "name"])
def test_an_update_changes_one_field(admin: KeyAdmin, field: str) -> None:
    before = create(admin)
    value = {**ALL_FIELDS, "name": "bob"}[field]
    changed = admin.handle("keys.update", {"key": "alice", field: value})
    assert changed == admin.handle("keys.get", {"key": before["id"]})
    assert {name for name in changed if changed[name] != before[name]} == {field}
    assert changed[field] == value
    back = {**NO_FIELDS, "name": "alice"}[field]
    assert admin.handle("keys.update", {"key": before["id"], field: back})[field] == back


def test_an_update_of_one_limit_leaves_the_others(admin: KeyAdmin) -> None:
    create(admin, **ALL_FIELDS)
    changed = admin.handle("keys.update", {"key": "alice", "limits": {"tpm": None, "rps": 0}})
    assert changed["limits"] == {**ALL_FIELDS["limits"], "tpm": None, "rps": 0}


def test_lists_are_stored_in_one_form(admin: KeyAdmin) -> None:
    networks = ["192.0.2.7", "::ffff:10.0.0.0/104", "2001:DB8::/32", "10.0.0.0/8"]
    created = create(admin, networks=networks, models=["b", "a", "b"])
    assert created["networks"] == ["192.0.2.7/32", "10.0.0.0/8", "2001:db8::/32"]
    assert created["models"] == ["b", "a"]


@pytest.mark.parametrize(
    ("budget", "shown"),
    [(0, "0"), (12, "12"), (0.1, "0.1"), ("100.00", "100"), ("0.000001", "0.000001"), ("1e3", "1000")],
)
def test_money_is_exact(admin: KeyAdmin, budget: object, shown: str) -> None:
    assert create(admin, budget=budget)["budget"] == shown


# Rotation


def test_a_rotation_ends_the_old_key_and_its_tokens_at_once(admin: KeyAdmin) -> None:
    before = create(admin)
    token = admin.handle("keys.token", {"key": "alice"})["token"]
    after = admin.handle("keys.rotate", {"key": "alice"})
    assert (after["id"], after["old_key_until"]) == (before["id"], None)
    assert after["secret_key"] == secret_key(admin.master, before["id"], 2)
    assert principal_of(admin, after["api_key"]) == Principal(
        id=before["id"], name="alice", role="user", index=0
    )
    for old, code in ((before["api_key"], "key_expired"), (token, "bad_signature")):
        with pytest.raises(AuthenticationFailed) as caught:
            principal_of(admin, old)
        assert caught.value.code == code


def test_a_rotation_can_overlap(admin: KeyAdmin) -> None:
    before = create(admin)
    token = admin.handle("keys.token", {"key": "alice", "expires_in": 7200})["token"]
    after = admin.handle("keys.rotate", {"key": "alice", "overlap": 600})
    until = after["old_key_until"]
    assert 590 < until - time.time() <= 600
    for good in (before["api_key"], token, after["api_key"]):
        assert principal_of(admin, good, until - 1).id == before["id"]
    for old in (before["api_key"], token):
        with pytest.raises(AuthenticationFailed):
            principal_of(admin, old, until)
    assert admin.handle("keys.get", {"key": "alice"})["old_key_until"] == until


def test_only_the_last_of_two_rotations_overlaps(admin: KeyAdmin) -> None:
    made = [create(admin)] + [admin.handle("keys.rotate", {"key": "alice", "overlap": 600}) for _ in range(2)]
    with pytest.raises(AuthenticationFailed, match=keys.UNKNOWN):
        principal_of(admin, made[0]["api_key"])
    assert [principal_of(admin, key["api_key"]).name for key in made[1:]] == ["alice", "alice"]


# Tokens


def test_a_token_is_made_for_a_key(admin: KeyAdmin) -> None:
    create(admin, models=["a", "b"], networks=["10.0.0.0/8"])
    wanted = {"expires_in": 60, "models": ["a"], "networks": ["10.1.0.0/16"], "max_tokens": 9}
    made = admin.handle("keys.token", {"key": "alice", **wanted})
    principal = principal_of(admin, made["token"])
    assert (principal.token_id, principal.expires) == (made["token_id"], made["expires"])
    assert (principal.models, principal.max_tokens) == (frozenset("a"), 9)
    assert 55 < made["expires"] - time.time() <= 60


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"models": ["c"]}, "would be refused: The token asks for the model 'c', which its key may not use."),
        ({"networks": ["11.0.0.0/8"]}, "the network '11.0.0.0/8'"),
        ({"networks": ["all"]}, "'all' is no network"),
        ({"expires_in": 86_401}, "can't be made: it must live 1 to 86400 seconds."),
        ({"expires_in": float("nan")}, "it must live 1 to 86400 seconds"),
        ({"models": []}, "can't be made"),
        ({"max_tokens": 0}, "can't be made"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"role": "admin"}, "role"),
    ],
)
def test_no_token_is_made_that_would_be_refused(
    admin: KeyAdmin, options: dict[str, Any], sentence: str
) -> None:
    create(admin, models=["a"], networks=["10.0.0.0/8"])
    with pytest.raises(SetupError) as caught:
        admin.handle("keys.token", {"key": "alice", **options})
    assert sentence in str(caught.value)


def test_no_token_is_made_for_a_disabled_key(admin: KeyAdmin) -> None:
    create(admin, enabled=False)
    with pytest.raises(SetupError, match="would be refused: The API key is disabled"):
        admin.handle("keys.token", {"key": "alice"})


def test_reading_operations_change_nothing(admin: KeyAdmin) -> None:
    create(admin)
    before = admin.store.list()
    for op in READ_ONLY:
        admin.handle(op, {} if op == "keys.list" else {"key": "alice"})
    assert admin.store.list() == before


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
        ("keys.create", {"name": 7}, "name: expected `str`, got `int`"),
        ("keys.create", {"name": "a", "role": "root"}, "must be one of user, admin, metrics, not 'root'"),
        ("keys.create", {"name": "a", "rps": 1}, "unknown field `rps`"),
        *(
            ("keys.create", {"name": "a", "limits": {limit: value}}, f"limits.{limit}: ")
            for limit in NO_LIMITS
            for value in (-1, float("nan"), float("inf"), 10**400, "5", True)
        ),
        ("keys.create", {"name": "a", "limits": {"rpd": 1}}, "limits: object contains unknown field `rpd`"),
        ("keys.create", {"name": "a", "limits": None}, "limits: expected `object`, got `null`"),
        ("keys.create", {"name": "a", "limits": {"tpm": 1.5}}, "limits.tpm: expected `int | null`"),
        ("keys.create", {"name": "a", "owner": "o" * 201}, "owner: expected `str` of length <= 200"),
        ("keys.create", {"name": "a", "owner": "a\tb"}, "owner must be printable"),
        ("keys.create", {"name": "a", "enabled": 1}, "enabled: expected `bool`"),
        ("keys.create", {"name": "a", "expires": 1}, "must expire in the future"),
        ("keys.create", {"name": "a", "expires": "2030-01-01"}, "expires: expected `int | null`"),
        ("keys.create", {"name": "a", "models": []}, "models: expected `array` of length >= 1"),
        ("keys.create", {"name": "a", "models": ["m"] * 101}, "models: expected `array` of length <= 100"),
        ("keys.create", {"name": "a", "models": ["a,b"]}, "'a,b' is no name of a model"),
        ("keys.create", {"name": "a", "models": [""]}, "'' is no name of a model"),
        ("keys.create", {"name": "a", "models": [7]}, "models[0]: expected `str`"),
        ("keys.create", {"name": "a", "networks": []}, "networks: expected `array` of length >= 1"),
        ("keys.create", {"name": "a", "networks": ["10.0.0.1/8"]}, "did you mean 10.0.0.0/8?"),
        ("keys.create", {"name": "a", "networks": ["fe80::1%eth0"]}, "names an interface"),
        ("keys.create", {"name": "a", "networks": ["10.0.0.0/33"]}, "'10.0.0.0/33' is no network"),
        ("keys.create", {"name": "a", "networks": "10.0.0.0/8"}, "networks: expected `array | null`"),
        *(
            ("keys.create", {"name": "a", "budget": budget}, "budget")
            for budget in (-1, "0.0000001", "NaN", "inf", 10**13, "much", True)
        ),
        ("keys.update", {"key": "a", "id": "b"}, "unknown field `id`"),
        ("keys.update", {"key": "a", "hash": "b"}, "unknown field `hash`"),
        ("keys.update", {"key": "a", "name": None}, "name: expected `str`"),
        ("keys.rotate", {"key": "a", "overlap": -1}, "overlap: expected `int` >= 0"),
        ("keys.rotate", {"key": "a", "overlap": 10**8}, "overlap: expected `int` <= 7776000"),
        ("keys.get", {"key": "nobody"}, "There is no key with the id or name 'nobody'."),
        ("keys.token", {"key": "nobody"}, "There is no key with the id or name 'nobody'."),
        ("keys.update", {"key": "nobody", "rps": 5}, "unknown field `rps`"),
        ("keys.update", {"key": "nobody", "owner": "x"}, "There is no key with the id or name 'nobody'."),
        ("keys.rotate", {"key": "nobody"}, "There is no key with the id or name 'nobody'."),
        ("keys.delete", {"key": "nobody"}, "There is no key with the id or name 'nobody'."),
        ("keys.delete", {"key": None}, "There is no key with the id or name None."),
        ("keys.set_enabled", {"key": "x", "enabled": True}, "There is no key with the id or name 'x'."),
    ],
)
def test_a_wrong_request_is_refused(empty: KeyAdmin, op: str, params: dict[str, Any], sentence: str) -> None:
    with pytest.raises(SetupError) as caught:
        empty.handle(op, params)
    assert sentence in str(caught.value)
    assert empty.handle("keys.list", {}) == []


def test_the_first_start_makes_one_admin_key(admin: KeyAdmin) -> None:
    key = ensure_admin(admin)
    assert key is not None
    principal = KeyTable(admin.store.list(), admin.master).authenticate(f"Bearer {key}".encode())
    assert (principal.name, principal.role, principal.limits.rps) == ("admin", "admin", None)
    assert ensure_admin(admin) is None
    assert len(admin.store.list()) == 1


# The master key


def test_keys_without_their_master_key_are_refused(admin: KeyAdmin, tmp_path: Path) -> None:
    create(admin)
    (tmp_path / "data" / FILE_NAME).unlink()
    with pytest.raises(SetupError, match="is missing"):
        open_admin(tmp_path / "data")


def test_a_wrong_master_key_is_refused_before_any_key_is(admin: KeyAdmin, tmp_path: Path) -> None:
    create(admin)
    file = tmp_path / "data" / FILE_NAME
    file.write_text("ab" * 32)
    with pytest.raises(SetupError) as caught:
        open_admin(tmp_path / "data")
    sentence = str(caught.value)
    assert f"The master key in {file} is not the one" in sentence
    assert master_id(bytes.fromhex("ab" * 32)) in sentence
    assert master_id(admin.master) in sentence
    assert admin.master.hex() not in sentence


def test_a_wrong_variable_is_named(admin: KeyAdmin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create(admin)
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", "ab" * 32)
    with pytest.raises(SetupError, match="The master key in DEEPSEEK_MASTER_KEY is not the one"):
        open_admin(tmp_path / "data")
    monkeypatch.setenv("DEEPSEEK_MASTER_KEY", admin.master.hex())
    open_admin(tmp_path / "data").close()


def test_without_keys_any_master_key_will_do(admin: KeyAdmin, tmp_path: Path) -> None:
    (tmp_path / "data" / FILE_NAME).unlink()
    again = open_admin(tmp_path / "data")
    assert again.master != admin.master
    assert again.store.master_id() == master_id(again.master)
    again.close()


def test_keys_of_an_older_version_take_the_master_key_that_is_there(admin: KeyAdmin, tmp_path: Path) -> None:
    create(admin)
    with closing(sqlite3.connect(tmp_path / "data" / DATABASE)) as connection, connection:
        connection.execute("DELETE FROM master_key")
    open_admin(tmp_path / "data").close()
    assert admin.store.master_id() == master_id(admin.master)


def test_a_copied_directory_works(admin: KeyAdmin, tmp_path: Path) -> None:
    created = create(admin)
    admin.close()
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    copy = open_admin(tmp_path / "copy")
    assert principal_of(copy, created["api_key"]).name == "alice"
    copy.close()


def test_a_backup_of_an_open_directory_works(admin: KeyAdmin, tmp_path: Path) -> None:
    created = create(admin)
    assert backup_keys(tmp_path / "data", tmp_path / "backup") == master_id(admin.master)
    create(admin, "too late")
    files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "backup").iterdir()}
    assert files == {DATABASE: 0o600, FILE_NAME: 0o600}
    assert stat.S_IMODE((tmp_path / "backup").stat().st_mode) == 0o700
    restored = open_admin(tmp_path / "backup")
    assert principal_of(restored, created["api_key"]).name == "alice"
    assert len(restored.store.list()) == 1
    assert create(restored, "new")["id"]
    restored.close()


def test_a_backup_overwrites_nothing(admin: KeyAdmin, tmp_path: Path) -> None:
    create(admin)
    (tmp_path / "backup").mkdir()
    (tmp_path / "backup" / "precious").touch()
    with pytest.raises(SetupError, match="is not empty"):
        backup_keys(tmp_path / "data", tmp_path / "backup")
    assert [path.name for path in (tmp_path / "backup").iterdir()] == ["precious"]


FOREIGN = "sk-1234567890abcdefghijklmn"


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bring(admin: KeyAdmin, key: str = FOREIGN, **fields: Any) -> dict[str, Any]:
    [made] = admin.handle("keys.import", {"keys": [{"sha256": sha256(key), "name": "theirs", **fields}]})[
        "created"
    ]
    return dict(made)


def test_an_imported_key_is_let_in_as_it_always_was_with_its_limits(admin: KeyAdmin) -> None:
    made = bring(admin, models=["a"], limits={"rpm": 3}, budget="1.5", networks=["10.0.0.0/8"])
    principal = principal_of(admin, FOREIGN)
    assert (principal.id, principal.models, principal.limits.rpm) == (made["id"], {"a"}, 3)
    assert (principal.budget, principal.networks is None) == (1_500_000, False)
    for wrong in (FOREIGN + "x", FOREIGN[:-1], sha256(FOREIGN), "sk-" + "1" * 48):
        with pytest.raises(AuthenticationFailed) as caught:
            principal_of(admin, wrong)
        assert caught.value.message == keys.MALFORMED


def test_a_key_of_new_api_is_known_without_its_prefix_too(admin: KeyAdmin) -> None:
    bare = "aB3" * 16
    made = bring(admin, "sk-" + bare)
    assert principal_of(admin, bare).id == principal_of(admin, f"sk-{bare}").id == made["id"]


def test_what_is_imported_twice_is_there_once(admin: KeyAdmin) -> None:
    made = bring(admin, limits={"rpm": 3})
    again = admin.handle("keys.import", {"keys": [{"sha256": sha256(FOREIGN).upper(), "name": "other"}]})
    assert again == {"created": [], "present": [sha256(FOREIGN).upper()]}
    assert [key["id"] for key in admin.handle("keys.list", {})] == [made["id"]]
    admin.handle("keys.rotate", {"key": "theirs"})
    again = admin.handle("keys.import", {"keys": [{"sha256": sha256(FOREIGN), "name": "other"}]})
    assert again["created"] == []  # else rotation would be undone


def test_an_imported_key_is_disabled_rotated_and_has_tokens_as_any(admin: KeyAdmin) -> None:
    bring(admin)
    token = admin.handle("keys.token", {"key": "theirs"})["token"]
    assert principal_of(admin, token).name == "theirs"
    admin.handle("keys.set_enabled", {"key": "theirs", "enabled": False})
    with pytest.raises(AuthenticationFailed, match="disabled"):
        principal_of(admin, FOREIGN)
    admin.handle("keys.set_enabled", {"key": "theirs", "enabled": True})
    rotated = admin.handle("keys.rotate", {"key": "theirs", "overlap": 60})
    assert principal_of(admin, rotated["api_key"]).id == principal_of(admin, FOREIGN).id
    with pytest.raises(AuthenticationFailed, match="rotated"):
        principal_of(admin, FOREIGN, time.time() + 61)
    admin.handle("keys.delete", {"key": "theirs"})
    with pytest.raises(AuthenticationFailed):
        principal_of(admin, FOREIGN)


def test_an_expired_key_is_imported_and_said_to_have_expired(admin: KeyAdmin) -> None:
    bring(admin, expires=1_700_000_000)
    with pytest.raises(AuthenticationFailed, match="expired"):
        principal_of(admin, FOREIGN)


@pytest.mark.parametrize(
    "wrong",
    [{"name": "a"}, {"sha256": "12", "name": "a"}, {"sha256": "0" * 64}, {"sha256": "0" * 64, "name": ""}],
)
def test_one_wrong_key_among_many_and_none_is_imported(empty: KeyAdmin, wrong: dict[str, Any]) -> None:
    good = {"sha256": "1" * 64, "name": "good"}
    with pytest.raises(SetupError):
        empty.handle("keys.import", {"keys": [good, wrong]})
    assert empty.handle("keys.list", {}) == []
