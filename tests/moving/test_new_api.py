"""What new-api and one-api keep in their database, as our configuration and keys."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat import config
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.keys import sha256
from deepseek_api_compat.moving.new_api import read_database
from deepseek_api_compat.moving.result import Moved

KEY = "aB3" * 16
Tables = dict[str, list[dict[str, Any]]]


def channel(id: int, **columns: Any) -> dict[str, Any]:
    return {
        "id": id,
        "type": 1,
        "key": f"sk-up{id}",
        "name": f"c{id}",
        "base_url": f"http://127.0.0.1:900{id}",
        "models": "chat",
        "model_mapping": "",
        "group": "default",
        "weight": 0,
        "priority": 0,
        "status": 1,
        "auto_ban": 1,
        **columns,
    }


def token(**columns: Any) -> dict[str, Any]:
    return {
        "id": 1,
        "user_id": 1,
        "key": KEY,
        "name": "alice",
        "status": 1,
        "remain_quota": 750_000,
        "unlimited_quota": 0,
        "expired_time": -1,
        "model_limits_enabled": 0,
        "model_limits": "",
        "allow_ips": "",
        "group": "",
        **columns,
    }


def moved_from(tmp_path: Path, tables: Tables) -> Moved:
    file = tmp_path / "one-api.db"
    with closing(sqlite3.connect(file)) as database:
        for table, rows in tables.items():
            names = ", ".join(f'"{name}"' for name in rows[0])
            database.execute(f"CREATE TABLE {table} ({names})")
            marks = ", ".join("?" * len(rows[0]))
            database.executemany(
                f"INSERT INTO {table} VALUES ({marks})", [tuple(row.values()) for row in rows]
            )
        database.commit()
    moved = read_database(file)
    if moved.models:
        (tmp_path / "made.toml").write_text(moved.toml("a test"))
        config.load(str(tmp_path / "made.toml"), environ={})
    return moved


def why(moved: Moved, place: str) -> tuple[str, str]:
    [entry] = [entry for entry in moved.report.entries if entry.place == place]
    return entry.outcome, entry.why


def test_channels_are_engines_of_their_models(tmp_path: Path) -> None:
    rows = [
        channel(1, models="chat,embed", model_mapping='{"chat": "their-chat"}', weight=3, priority=5),
        channel(2, key="sk-a\nsk-b", weight=1, priority=5),
        channel(3, type=43, base_url="", weight=9),
    ]
    moved = moved_from(tmp_path, {"channels": rows})
    engines = [
        (engine["base_url"], engine["model"], engine["weight"]) for engine in moved.models["chat"].engines
    ]
    assert engines == [
        ("http://127.0.0.1:9001/v1", "their-chat", 3.0),
        ("http://127.0.0.1:9002/v1", "chat", 1.0),
        ("http://127.0.0.1:9002/v1", "chat", 1.0),
        ("https://api.deepseek.com/v1", "chat", 0.0),
    ]
    assert sorted(moved.secrets.values()) == ["sk-a", "sk-b", "sk-up1", "sk-up3"]
    assert "sk-" not in moved.toml("a test")
    assert len(moved.models["embed"].engines) == 1


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"status": 2}, "disabled"),
        ({"type": 14}, "Anthropic"),
        ({"type": 3}, "Azure"),
        ({"type": 8, "base_url": "http://x/{model}"}, "no http URL"),
        ({"type": 47, "base_url": ""}, "no http URL"),
    ],
)
def test_a_channel_that_cannot_be_carried_is_listed(tmp_path: Path, columns: Any, reason: str) -> None:
    moved = moved_from(tmp_path, {"channels": [channel(1, **columns)]})
    outcome, said = why(moved, "channel 1 c1")
    assert (outcome, reason in said, moved.models) == ("not carried", True, {})


def test_the_same_number_is_another_provider_in_one_api(tmp_path: Path) -> None:
    row = channel(1, type=36, base_url="")
    del row["auto_ban"]
    moved = moved_from(tmp_path, {"channels": [row]})
    assert moved.models["chat"].engines[0]["base_url"] == "https://api.deepseek.com/v1"
    (tmp_path / "new").mkdir()
    assert moved_from(tmp_path / "new", {"channels": [channel(1, type=36, base_url="")]}).models == {}


def test_ratios_are_prices(tmp_path: Path) -> None:
    options = {
        "ModelRatio": {"chat": 0.135, "free": 0},
        "CompletionRatio": {"chat": 4},
        "CacheRatio": {"chat": 0.25},
        "ModelPrice": {"painter": 0.1},
        "GroupRatio": {"vip": 0.5},
    }
    rows = [{"key": name, "value": json.dumps(value)} for name, value in options.items()]
    rows.append({"key": "SMTPToken", "value": "secret"})
    channels = [channel(1, models="chat,free,painter,unknown")]
    moved = moved_from(tmp_path, {"channels": channels, "options": rows})
    assert moved.prices["chat"] == {
        "prompt": Decimal("0.27"),
        "completion": Decimal("1.08"),
        "cached": Decimal("0.0675"),
    }
    assert why(moved, "price of free")[0] == "partly"
    for place in ("price of painter", "price of unknown", "option GroupRatio", "options (1)"):
        assert why(moved, place)[0] == "not carried"
    assert "secret" not in moved.report.as_text() + moved.toml("a test")


def key_of(tmp_path: Path, user: dict[str, Any] | None = None, **columns: Any) -> dict[str, Any]:
    tables: Tables = {
        "channels": [channel(1, models="chat,small"), channel(2, models="large", group="vip")],
        "tokens": [token(**columns)],
    }
    if user is not None:
        tables["users"] = [{"id": 1, "username": "al", "status": 1, "group": "vip", "quota": 1, **user}]
    [key] = moved_from(tmp_path, tables).keys
    return key


def test_a_token_is_a_key_with_what_is_left_of_its_quota(tmp_path: Path) -> None:
    key = key_of(tmp_path, group="default", allow_ips="192.0.2.7\n10.1.0.0/8", expired_time=1_900_000_000)
    assert key["sha256"] == sha256(f"sk-{KEY}")
    assert (Decimal(key["budget"]), key["expires"]) == (Decimal("1.5"), 1_900_000_000)
    assert key["networks"] == ["192.0.2.7/32", "10.0.0.0/8"]


def test_an_unlimited_token_has_what_its_user_has_left(tmp_path: Path) -> None:
    key = key_of(tmp_path, {"quota": 500_000}, unlimited_quota=1)
    assert Decimal(key["budget"]) == 1
    assert key["owner"] == "al"


def test_an_unlimited_token_without_users_has_no_budget(tmp_path: Path) -> None:
    assert "budget" not in key_of(tmp_path, unlimited_quota=1)


def test_a_group_is_the_models_that_it_may_use(tmp_path: Path) -> None:
    assert key_of(tmp_path)["models"] == ["chat", "small"]


def test_a_users_group_holds_for_tokens_without_one(tmp_path: Path) -> None:
    assert key_of(tmp_path, {})["models"] == ["large"]


def test_limits_of_models_within_those_of_the_group(tmp_path: Path) -> None:
    assert key_of(tmp_path, model_limits_enabled=1, model_limits="small,large")["models"] == ["small"]


@pytest.mark.parametrize(
    ("user", "columns"),
    [
        (None, {"status": 2}),
        ({"status": 2}, {}),
        (None, {"allow_ips": "somewhere"}),
        (None, {"model_limits_enabled": 1, "model_limits": "large"}),
    ],
)
def test_what_may_do_nothing_is_disabled(tmp_path: Path, user: Any, columns: Any) -> None:
    assert key_of(tmp_path, user, **columns)["enabled"] is False


def test_states_of_tokens(tmp_path: Path) -> None:
    assert key_of(tmp_path, status=3, expired_time=5)["expires"] == 5
    (tmp_path / "x").mkdir()
    assert Decimal(key_of(tmp_path / "x", status=4, remain_quota=-3)["budget"]) == 0


def test_another_database_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="none of the tables"):
        moved_from(tmp_path, {"other": [{"a": 1}]})
