"""Whatever stands where something else should: an error of one sentence, or a line in the report."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.keys import sha256
from deepseek_api_compat.moving.litellm import read_config
from deepseek_api_compat.moving.litellm_keys import read_keys
from deepseek_api_compat.moving.new_api import _Reader

ODD: list[Any] = [
    None,
    True,
    -1,
    1e400,
    "",
    "\x00\n",
    [],
    [[1]],
    {},
    {"a": {1: 2}},
    "{",
    "[1",
    "\u2028é" * 99,
]
CONFIG = {
    "model_list": [
        {
            "model_name": "chat",
            "litellm_params": {
                "model": "openai/x",
                "api_base": "http://127.0.0.1:9/v1",
                "api_key": "k",
                "rpm": 1,
                "weight": 1,
                "max_parallel_requests": 2,
                "input_cost_per_token": 1,
                "custom_llm_provider": "openai",
            },
            "model_info": {"mode": "chat", "access_groups": ["g"]},
        },
        {"model_name": "b", "litellm_params": {"model": "openai/x"}},
    ],
    "router_settings": {
        "routing_strategy": "least-busy",
        "model_group_alias": {"x": {"model": "chat"}},
        "fallbacks": [{"chat": ["b"]}],
    },
    "litellm_settings": {"default_fallbacks": ["chat"]},
    "general_settings": {"master_key": "sk-1", "allowed_ips": ["10.0.0.1"]},
    "environment_variables": {"A": "b"},
}
KEY: dict[str, Any] = {
    "token": sha256("sk-a"),
    "key_alias": "a",
    "models": ["chat"],
    "rpm_limit": 1,
    "max_budget": 1,
    "spend": 1,
    "expires": "2031-01-01",
    "blocked": False,
    "team_id": "t",
    "user_id": "u",
    "allowed_routes": [],
    "budget_duration": "1d",
}
TABLES: dict[str, list[dict[str, Any]]] = {
    "channels": [
        {
            "id": 1,
            "type": 1,
            "key": "k",
            "models": "chat",
            "status": 1,
            "base_url": "http://127.0.0.1:9",
            "model_mapping": '{"chat": "x"}',
            "group": "default",
            "weight": 1,
            "priority": 1,
            "auto_ban": 1,
            "channel_info": '{"multi_key_status_list": {"0": 1}}',
            "setting": "{}",
        }
    ],
    "tokens": [
        {
            "id": 1,
            "user_id": 1,
            "key": "k" * 48,
            "name": "n",
            "status": 1,
            "remain_quota": 1,
            "unlimited_quota": 0,
            "expired_time": -1,
            "model_limits_enabled": 1,
            "model_limits": "chat",
            "allow_ips": "10.0.0.1",
            "group": "auto",
        }
    ],
    "users": [{"id": 1, "username": "u", "status": 1, "quota": 1, "group": "default"}],
    "options": [{"key": "ModelRatio", "value": '{"chat": 1}'}, {"key": "QuotaPerUnit", "value": "5"}],
}


def places(value: Any) -> Iterator[tuple[Any, ...]]:
    """The path of each part."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (key,)
        yield from ((key, *rest) for rest in places(part))


def changed(value: Any, path: tuple[Any, ...], odd: Any) -> Any:
    made = copy.deepcopy(value)
    parent = made
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = odd
    return made


@pytest.mark.parametrize("path", list(places(CONFIG)), ids=str)
def test_in_a_configuration_of_litellm(tmp_path: Path, path: tuple[Any, ...]) -> None:
    file = tmp_path / "config.yaml"
    for odd in ODD:
        file.write_text(yaml.safe_dump(changed(CONFIG, path, odd)))
        with suppress(SetupError):
            assert read_config(file).report.entries


def test_in_a_key_of_litellm(tmp_path: Path) -> None:
    config, file = tmp_path / "config.yaml", tmp_path / "keys.json"
    config.write_text(yaml.safe_dump(CONFIG))
    moved = read_config(config)
    before = len(moved.report.entries)
    rows = [changed(KEY, path, odd) for path in places(KEY) for odd in ODD]
    file.write_text(json.dumps(rows))
    read_keys(file, moved)
    assert len(moved.report.entries) == before + len(rows)


@pytest.mark.parametrize("path", [path for path in places(TABLES) if len(path) == 3], ids=str)
def test_in_a_database_of_new_api(path: tuple[Any, ...]) -> None:
    for odd in [*ODD, b"\xff", '{"chat": "x"}', '{"multi_key_status_list": 1}', '{"chat": [1]}']:
        if not isinstance(odd, (list, dict)):  # no column holds these
            assert _Reader(Path("x"), changed(TABLES, path, odd)).read().report.entries
