"""What a LiteLLM proxy is told and keeps, as our configuration and keys."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat import config
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.keys import sha256
from deepseek_api_compat.moving.litellm import read_config
from deepseek_api_compat.moving.litellm_keys import read_keys
from deepseek_api_compat.moving.result import Moved

CONFIG = """
model_list:
  - model_name: chat
    litellm_params:
      model: openai/their-chat
      api_base: http://127.0.0.1:9001/v1
      api_key: sk-literal-secret
      rpm: 60
      tpm: 1000
      weight: 2
      input_cost_per_token: 2.7e-07
      output_cost_per_token: 0.0000011
  - model_name: chat
    litellm_params:
      model: hosted_vllm/their-chat
      api_base: http://127.0.0.1:9002/v1
      rpm: 40
      max_parallel_requests: 3
      timeout: 30
  - model_name: deepseek
    litellm_params: {model: deepseek/deepseek-chat, api_key: os.environ/DEEPSEEK_KEY_OF_OURS}
    model_info: {mode: chat, base_model: x, access_groups: [cheap]}
  - model_name: claude
    litellm_params: {model: anthropic/claude, api_key: sk-ant}
  - model_name: "openai/*"
    litellm_params: {model: "openai/*"}
  - model_name: painter
    litellm_params: {model: openai/dall-e-3}
    model_info: {mode: image_generation}
router_settings:
  routing_strategy: simple-shuffle
  model_group_alias: {gpt-4: chat, deepseek: chat, lost: nothing}
  fallbacks: [{chat: [deepseek, nowhere]}, {deepseek: [chat]}]
  num_retries: 2
litellm_settings: {callbacks: [langfuse], drop_params: true}
general_settings: {master_key: sk-master-1234, database_url: "postgresql://x", alerting: [slack]}
guardrails: [{guardrail_name: a}]
"""


def moved_from(tmp_path: Path, text: str = CONFIG) -> Moved:
    path = tmp_path / "litellm.yaml"
    path.write_text(text)
    return read_config(path)


def outcomes(moved: Moved) -> dict[str, str]:
    return {entry.place: entry.outcome for entry in moved.report.entries}


def loaded(moved: Moved, tmp_path: Path) -> config.Settings:
    path = tmp_path / "made.toml"
    path.write_text(moved.toml("a test"))
    return config.load(str(path), environ={})


def test_models_upstreams_limits_and_prices(tmp_path: Path) -> None:
    moved = moved_from(tmp_path)
    chat, deepseek = loaded(moved, tmp_path).models
    assert (chat.name, chat.aliases, chat.fallback, chat.routing) == (
        "chat",
        ["gpt-4"],
        ["deepseek"],
        "round-robin",
    )
    first, second = chat.engines
    assert (first.base_url, first.model, first.weight) == ("http://127.0.0.1:9001/v1", "their-chat", 2.0)
    assert (second.base_url, second.api_key_env, second.concurrency) == ("http://127.0.0.1:9002/v1", None, 3)
    assert chat.limits.requests_per_minute == 100
    assert chat.limits.tokens_per_minute == 0  # one of the two has none
    [other] = deepseek.engines
    assert (other.base_url, other.model) == ("https://api.deepseek.com/v1", "deepseek-chat")
    assert other.api_key_env == "DEEPSEEK_KEY_OF_OURS"
    [price] = loaded(moved, tmp_path).prices
    assert (price.prompt, price.completion) == (Decimal("0.27"), Decimal("1.1"))


def test_secrets_of_upstreams_are_not_in_the_configuration(tmp_path: Path) -> None:
    moved = moved_from(tmp_path)
    assert "sk-" not in moved.toml("a test")
    variable = moved.models["chat"].engines[0]["api_key_env"]
    assert moved.environment() == f"{variable}=sk-literal-secret\n"


def test_everything_that_was_read_is_in_the_report(tmp_path: Path) -> None:
    found = outcomes(moved_from(tmp_path))
    left = {place for place, outcome in found.items() if outcome == "not carried"}
    assert left == {
        "model_list[2] chat: timeout",
        "model_list[3] deepseek: model_info.base_model",
        "model_list[4] claude",
        "model_list[5] openai/*",
        "model_list[6] painter",
        "tpm of chat",
        "alias deepseek",
        "alias lost",
        "fallback chat -> nowhere",
        "fallback deepseek -> chat",
        "general_settings: database_url",
        "router_settings: num_retries",
        "litellm_settings: callbacks",
        "litellm_settings: drop_params",
        "general_settings: alerting",
        "guardrails",
    }
    assert found["variable DEEPSEEK_KEY_OF_OURS"] == "partly"
    assert found["rpm of chat"] == found["routing_strategy simple-shuffle"] == "partly"
    assert found["general_settings: master_key"] == "carried"


def test_the_master_key_becomes_an_admin_key(tmp_path: Path) -> None:
    [key] = moved_from(tmp_path).keys
    assert (key["sha256"], key["role"]) == (sha256("sk-master-1234"), "admin")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model_list: [", "line 1"),
        ("- a", "must be a mapping with model_list"),
        ("model_list: 5", "model_list must be a list"),
        ("model_list: [{litellm_params: {}}]", r"model_list\[1\] must be a mapping with model_name"),
        ("general_settings: 5", "general_settings must be a mapping"),
    ],
)
def test_broken_configurations_are_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(SetupError, match=said):
        moved_from(tmp_path, text)


def key_of(tmp_path: Path, **columns: Any) -> tuple[dict[str, Any], str, str]:
    """The key that a row becomes, what became of it, and why."""
    moved = moved_from(tmp_path, "\n".join(line for line in CONFIG.splitlines() if "general" not in line))
    path = tmp_path / "keys.json"
    path.write_text(json.dumps([{"token": sha256("sk-a"), "key_alias": "alice", **columns}]))
    read_keys(path, moved)
    [entry] = [entry for entry in moved.report.entries if entry.place == "key alice"]
    [key] = moved.keys or [{}]
    return key, entry.outcome, entry.why


def test_a_key_with_all_that_can_be_carried(tmp_path: Path) -> None:
    key, outcome, _ = key_of(
        tmp_path,
        models="{chat,deepseek}",
        rpm_limit="5",
        tpm_limit=600,
        max_parallel_requests=2,
        max_budget=10.0,
        spend=2.5000004,
        expires="2031-01-02 03:04:05.123",
        user_id="u1",
        aliases="{}",
    )
    assert outcome == "carried"
    assert key == {
        "sha256": sha256("sk-a"),
        "name": "alice",
        "owner": "u1",
        "models": ["chat", "deepseek"],
        "limits": {"rpm": 5, "tpm": 600, "concurrency": 2},
        "budget": "7.500000",
        "expires": 1925089445,
    }


def test_a_budget_by_periods_is_what_is_left_of_this_one(tmp_path: Path) -> None:
    key, outcome, why = key_of(tmp_path, max_budget=1, spend=3, budget_duration="30d")
    assert (Decimal(key["budget"]), outcome) == (0, "partly")
    assert "every 30d" in why


@pytest.mark.parametrize(
    "columns",
    [
        {"blocked": "t"},
        {"team_id": "unknown", "models": "{all-team-models}"},
        {"allowed_routes": ["management_routes"]},
        {"rpm_limit": 0},
        {"max_budget": "much"},
        {"expires": "soon"},
        {"models": ["no-default-models"]},
        {"models": ["nothing/*"]},
        {"models": [f"m{number}" for number in range(101)]},
    ],
)
def test_a_restriction_that_cannot_be_carried_disables_the_key(tmp_path: Path, columns: Any) -> None:
    key, _, _ = key_of(tmp_path, **columns)
    assert key["enabled"] is False


def test_patterns_of_models_are_written_out(tmp_path: Path) -> None:
    assert key_of(tmp_path, models=["deep*"])[0]["models"] == ["deepseek"]
    assert key_of(tmp_path, models=["cheap"])[0]["models"] == ["deepseek"]  # an access group
    assert "models" not in key_of(tmp_path, models=["all-proxy-models"])[0]


def test_what_else_is_set_of_a_key_is_said(tmp_path: Path) -> None:
    _, outcome, why = key_of(tmp_path, metadata='{"guardrails": ["a"]}', model_max_budget={"chat": 1})
    assert (outcome, why) == ("partly", "there is nothing like its metadata, model_max_budget here")


@pytest.mark.parametrize("columns", [{"token": "abc"}, {"team_id": "litellm-dashboard"}])
def test_what_is_no_key_of_a_client_stays_behind(tmp_path: Path, columns: Any) -> None:
    key, outcome, _ = key_of(tmp_path, **columns)
    assert (key, outcome) == ({}, "not carried")


def test_keys_in_a_dump_have_what_their_team_and_budget_say(tmp_path: Path) -> None:
    dump = f"""
COPY public."LiteLLM_BudgetTable" (budget_id, max_budget, rpm_limit) FROM stdin;
b1\t4\t7
\\.
COPY public."LiteLLM_TeamTable" (team_id, team_alias, models, max_budget, blocked) FROM stdin;
t1\tsales\t{{chat}}\t100\tf
\\.
COPY public."LiteLLM_VerificationToken" (token, key_alias, models, team_id, budget_id, spend) FROM stdin;
{sha256("sk-a")}\ta\t{{}}\tt1\tb1\t1
{sha256("sk-b")}\tb\t{{chat,deepseek}}\tt1\t\\N\t0
\\.
COPY public."LiteLLM_UserTable" (user_id) FROM stdin;
u1
\\.
"""
    moved = moved_from(tmp_path)
    (tmp_path / "dump.sql").write_text(dump)
    read_keys(tmp_path / "dump.sql", moved)
    _, a, b = moved.keys
    assert (a["models"], Decimal(a["budget"]), a["limits"]) == (["chat"], 3, {"rpm": 7})
    assert b["models"] == ["chat"]
    found = outcomes(moved)
    assert found["team sales"] == found["table LiteLLM_UserTable (1 rows)"] == "not carried"
