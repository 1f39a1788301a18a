"""The virtual keys of a LiteLLM proxy, of which its database holds the SHA-256 alone."""

from __future__ import annotations

import fnmatch
import json
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from deepseek_api_compat.moving.keys import key_name, put_key, sha256
from deepseek_api_compat.moving.result import Moved, money, truth, whole
from deepseek_api_compat.moving.sql_dump import Row
from deepseek_api_compat.moving.tables import read_tables

KEYS, TEAMS, BUDGETS = "LiteLLM_VerificationToken", "LiteLLM_TeamTable", "LiteLLM_BudgetTable"
# Read only to say that they stay behind.
_OTHERS = {
    "LiteLLM_UserTable": "users and their shared budgets are not kept; keys are",
    "LiteLLM_OrganizationTable": "organizations are not kept; keys are",
    "LiteLLM_ProxyModelTable": "models in the database are encrypted: write them into config.yaml",
}
_DASHBOARD = "litellm-dashboard"  # the team of sessions of its console
_LIMITS = {"rpm_limit": "rpm", "tpm_limit": "tpm", "max_parallel_requests": "concurrency"}
_ALL = {"all-proxy-models", "*"}
_OPEN_ROUTES = {"llm_api_routes", "openai_routes", "*", "/*", "/v1/*"}
# What only describes a key; all else that is set and not read is reported.
_DESCRIBES = {
    *("token", "key_name", "key_alias", "spend", "model_spend", "user_id", "team_id", "budget_id", "blocked"),
    *("created_at", "created_by", "updated_at", "updated_by", "last_active", "budget_reset_at", "expires"),
    *("rotation_count", "models", "max_budget", "budget_duration", "allowed_routes", *_LIMITS),
}


def read_keys(path: Path, moved: Moved) -> None:
    """Add the keys in a dump of LiteLLM's database, or an export of their table. Raises SetupError."""
    tables = read_tables(path, [KEYS, TEAMS, BUDGETS, *_OTHERS])
    teams = {str(row.get("team_id")): row for row in tables.get(TEAMS, [])}
    budgets = {str(row.get("budget_id")): row for row in tables.get(BUDGETS, [])}
    for row in tables.get(KEYS, []):
        for name in ("team_id", "budget_id"):
            row[name] = None if row.get(name) is None else str(row[name])
        _key(moved, row, teams, budgets.get(row["budget_id"]))
    for team in teams.values():
        shared = ("max_budget", "rpm_limit", "tpm_limit", "max_parallel_requests")
        set_ = [name for name in shared if team.get(name) not in (None, "")]
        why = f"keys share no limits here ({', '.join(set_)})" if set_ else "its keys are, with its models"
        moved.report.left(f"team {team.get('team_alias') or team.get('team_id')}", why)
    for table, why in _OTHERS.items():
        if rows := tables.get(table):
            moved.report.left(f"table {table} ({len(rows)} rows)", why)


def _key(moved: Moved, row: Row, teams: dict[Any, Row], budget: Row | None) -> None:
    token = str(row.get("token") or "")
    name = key_name(row.get("key_alias"), row.get("key_name"), f"litellm-{token[:8]}")
    place = f"key {name}"
    if row.get("team_id") == _DASHBOARD:
        moved.report.left(place, "a session of LiteLLM's console")
        return
    if token.startswith("sk-"):
        token = sha256(token)
    if not re.fullmatch("[0-9a-fA-F]{64}", token):
        moved.report.left(place, "its token is no SHA-256, so that its key can't be known")
        return
    for limit in ("max_budget", "budget_duration", *_LIMITS):
        if row.get(limit) in (None, "") and budget:
            row[limit] = budget.get(limit)
    fields: dict[str, Any] = {"name": name, "owner": _printable(row.get("user_id"))[:200]}
    partly: list[str] = []
    team = teams.get(row.get("team_id"))
    _restrict(moved, row, team, fields, partly)
    _limit(row, fields, partly)
    if truth(row.get("blocked")) or (team and truth(team.get("blocked"))):
        fields["enabled"] = False
    if expires := row.get("expires"):
        fields["expires"] = _moment(str(expires))
        if fields["expires"] is None:
            del fields["expires"]
            fields["enabled"] = False
            partly.append(f"its expiry {expires!r} can't be read: it is disabled")
    more = [name for name, value in row.items() if name not in _DESCRIBES and _is_set(value)]
    if more:
        partly.append(f"there is nothing like its {', '.join(sorted(more))} here")
    put_key(moved, place, token, fields, partly)


def _restrict(moved: Moved, row: Row, team: Row | None, fields: dict[str, Any], partly: list[str]) -> None:
    """What it may use. A restriction that can't be carried disables the key: it must not get more here."""
    names = _list(row.get("models"))
    of_team = _list(team.get("models")) if team else []
    if row.get("team_id") and team is None and (not names or "all-team-models" in names):
        fields["enabled"] = False
        partly.append("the models of its team are not in the dump: it is disabled until its models are set")
    if "no-default-models" in names:
        fields["enabled"] = False
        partly.append("it may use no model by itself: it is disabled")
    allowed = _models(moved, [name for name in names if name not in {"all-team-models", "no-default-models"}])
    if (team_models := _models(moved, of_team)) is not None:
        any_of_team = allowed is None or "all-team-models" in names
        allowed = team_models if any_of_team else [name for name in allowed or [] if name in team_models]
    if allowed is not None:
        fields["models"] = allowed
    routes = set(_list(row.get("allowed_routes")))
    if routes and not routes & _OPEN_ROUTES:
        fields["enabled"] = False
        partly.append(f"its allowed_routes ({', '.join(sorted(routes))}) can't be carried: it is disabled")


def _models(moved: Moved, names: list[str]) -> list[str] | None:
    """The models that these name, with what matches a pattern; None for all."""
    if not names or set(names) & _ALL:
        return None
    known = [*moved.models, *(alias for model in moved.models.values() for alias in model.aliases)]
    found = []
    for name in names:
        found += fnmatch.filter(known, name) if "*" in name else moved.groups.get(name, [name])
    return list(dict.fromkeys(found))


def _limit(row: Row, fields: dict[str, Any], partly: list[str]) -> None:
    limits = {}
    for theirs, ours in _LIMITS.items():
        if row.get(theirs) in (None, ""):
            continue
        found = whole(row[theirs])
        if found is None or found <= 0:  # 0 is no limit here
            fields["enabled"] = False
            partly.append(f"its {theirs} of {row[theirs]} lets nothing through: it is disabled")
        else:
            limits[ours] = found
    if limits:
        fields["limits"] = limits
    if row.get("max_budget") in (None, ""):
        return
    most, spent = money(row["max_budget"]), money(row.get("spend") or 0)
    if most is None or spent is None:
        fields["enabled"] = False
        partly.append(f"its budget {row['max_budget']!r} can't be read: it is disabled")
        return
    fields["budget"] = str(max(most - spent, most * 0))
    if duration := row.get("budget_duration"):
        partly.append(f"its budget is what was left, and does not come again every {duration}")


def _list(value: Any) -> list[str]:
    """Names in an array of PostgreSQL ({a,"b c"}), of JSON, or of Python."""
    if isinstance(value, str):
        text = value.strip()
        if text.startswith("["):
            try:
                value = json.loads(text)
            except ValueError:
                value = [text]
        elif text.startswith("{") and text.endswith("}"):
            pairs = re.findall(r'"((?:[^"\\]|\\.)*)"|([^,{}"]+)', text[1:-1])
            value = [re.sub(r"\\(.)", r"\1", quoted) if quoted else plain for quoted, plain in pairs]
        else:
            value = [part.strip() for part in text.split(",")]
    return [str(name) for name in value if name] if isinstance(value, list) else []


def _is_set(value: Any) -> bool:
    return value not in (None, "", False, 0, [], {}, "{}", "[]", "null", "f", "false", "False", "0")


def _moment(text: str) -> int | None:
    """Unix seconds of a time, which is UTC unless it says otherwise."""
    text = re.sub(r"(\.\d{1,6})\d*", lambda found: found[1].ljust(7, "0"), text.strip())
    text = re.sub(r"Z$", "+00:00", text)
    text = re.sub(r"([+-]\d\d)$", r"\1:00", text) if ":" in text else text
    try:
        found = datetime.fromisoformat(text)
        return int((found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp())
    except (ValueError, OverflowError):
        return None


def _printable(value: Any) -> str:
    return "".join(char for char in str(value or "") if char.isprintable())
