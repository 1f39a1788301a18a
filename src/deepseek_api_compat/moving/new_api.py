"""The database of new-api or one-api: channels as models and engines, tokens as keys, ratios as prices."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal
from ipaddress import ip_network
from pathlib import Path
from typing import Any

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.channel_types import NEW_API, ONE_API, channel_base
from deepseek_api_compat.moving.keys import key_name, put_key, sha256
from deepseek_api_compat.moving.result import Moved, money, truth, whole
from deepseek_api_compat.moving.sql_dump import Row
from deepseek_api_compat.moving.tables import read_tables
from deepseek_api_compat.security.scope import model_name

_ENABLED = 1
_EXPIRED = 3
_EXHAUSTED = 4
_QUOTA_PER_UNIT = Decimal(500_000)  # of 1 USD
_PER_RATIO = Decimal(2)  # USD per million tokens at ratio 1
_READ_OPTIONS = {"QuotaPerUnit", "ModelRatio", "CompletionRatio", "CacheRatio", "ModelPrice", "GroupRatio"}
_CHANNEL_EXTRAS = ("param_override", "header_override", "status_code_mapping", "openai_organization")


def read_database(path: Path) -> Moved:
    """What the database, or a dump of it, says. Raises SetupError that names the table."""
    tables = read_tables(path, ["channels", "tokens", "users", "options", "abilities"])
    if "channels" not in tables and "tokens" not in tables:
        raise SetupError(f"{path} has neither channels nor tokens: is it a database of new-api or one-api?")
    return _Reader(path, tables).read()


class _Reader:
    def __init__(self, path: Path, tables: dict[str, list[Row]]) -> None:
        self._path = path
        self._tables = tables
        self._users = {whole(row.get("id")): row for row in tables.get("users", [])}
        self._options = {str(row.get("key")): row.get("value") for row in tables.get("options", [])}
        self._groups: dict[str, set[str]] = {}  # of each model, those that may use it
        self._ranked: dict[str, list[tuple[int, int, dict[str, Any]]]] = {}  # (priority, weight, engine)
        self.moved = Moved()

    def read(self) -> Moved:
        rows = [*self._tables.get("channels", []), *self._tables.get("tokens", [])]
        types = NEW_API if any({"auto_ban", "model_limits_enabled"} & row.keys() for row in rows) else ONE_API
        for row in self._tables.get("channels", []):
            self._channel(row, types)
        for name, found in self._ranked.items():
            self._rank(name, found)
        self._prices()
        for row in self._tables.get("tokens", []):
            self._token(row)
        self._rest()
        return self.moved

    def _channel(self, row: Row, types: dict[int, tuple[str, str]]) -> None:
        place = f"channel {row.get('id')} {row.get('name') or ''}".rstrip()
        report = self.moved.report
        base, problem = channel_base(types, whole(row.get("type")) or 0, str(row.get("base_url") or ""))
        if whole(row.get("status")) != _ENABLED:
            problem = "it is disabled"
        if problem:
            report.left(place, problem)
            return
        mapping = self._json(row.get("model_mapping"), f"{place}: model_mapping")
        keys = [key.strip() for key in str(row.get("key") or "").split("\n") if key.strip()] or [""]
        found = self._json(row.get("channel_info"), f"{place}: channel_info").get("multi_key_status_list")
        dead = found if isinstance(found, dict) else {}
        groups = set(_split(row.get("group"))) or {"default"}
        names = []
        for name in _split(row.get("models")):
            try:
                names.append(model_name(name))
            except ValueError as error:
                report.left(f"{place}: model {name}", str(error))
        for name in names:
            self._groups.setdefault(name, set()).update(groups)
            for number, key in enumerate(keys):
                if dead.get(str(number), _ENABLED) != _ENABLED:
                    continue
                engine = {"kind": "openai", "base_url": base, "model": str(mapping.get(name, name))}
                if key:
                    engine["api_key_env"] = self.moved.secret(key)
                rank = (whole(row.get("priority")) or 0, whole(row.get("weight")) or 0, engine)
                self._ranked.setdefault(name, []).append(rank)
        if dead:
            report.left(f"{place}: {len(dead)} of its keys", "they are disabled")
        report.carried(place, f"{base}, {len(names)} models")
        for extra in _CHANNEL_EXTRAS:
            if row.get(extra) not in (None, "", "{}"):
                report.left(f"{place}: {extra}", "requests are not rewritten here")
        for extra in ("setting", "settings"):
            if settings := self._json(row.get(extra), f"{place}: {extra}"):
                report.left(f"{place}: {extra}", f"there is nothing like {', '.join(sorted(settings))} here")

    def _rank(self, name: str, found: list[tuple[int, int, dict[str, Any]]]) -> None:
        """Engines of the highest priority by their weights, the others when none of those has a free slot."""
        first = max(priority for priority, _, _ in found)
        weighted = any(weight for priority, weight, _ in found if priority == first)
        model = self.moved.model(name)
        for priority, weight, engine in sorted(found, key=lambda one: -one[0]):
            engine["weight"] = 0.0 if priority < first else float(weight) if weighted else 1.0
            model.engines.append(engine)
        model.routing = "round-robin"
        if len({priority for priority, _, _ in found}) > 2:
            self.moved.report.partly(f"priorities of {name}", "two levels: the highest, and all others")

    def _prices(self) -> None:
        ratios, completion, cached, fixed = (
            self._json(self._options.get(name), f"option {name}")
            for name in ("ModelRatio", "CompletionRatio", "CacheRatio", "ModelPrice")
        )
        for name in self.moved.models:
            place = f"price of {name}"
            prompt = money(_number(ratios.get(name)) * _PER_RATIO) if name in ratios else None
            if name in fixed:
                self.moved.report.left(place, "a price of a request; prices here are those of tokens")
            elif prompt is None:
                self.moved.report.left(
                    place, "the database has no ratio for it, new-api's own is in its program"
                )
            else:
                self.moved.prices[name] = {
                    "prompt": prompt,
                    "completion": money(prompt * _number(completion.get(name, 1))) or Decimal(0),
                }
                if name in cached:
                    price = money(prompt * _number(cached[name]))
                    self.moved.prices[name]["cached"] = prompt if price is None else price
                if name in completion:
                    self.moved.report.carried(place)
                else:
                    self.moved.report.partly(place, "no completion ratio is in the database: 1 is taken")
        group = self._json(self._options.get("GroupRatio"), "option GroupRatio")
        if odd := [name for name, ratio in group.items() if _number(ratio) != 1]:
            self.moved.report.left("option GroupRatio", f"prices are the same for all ({', '.join(odd)})")

    def _token(self, row: Row) -> None:
        key = str(row.get("key") or "").strip().removeprefix("sk-")
        name = key_name(row.get("name"), f"token-{row.get('id')}")
        place = f"token {row.get('id')} {name}"
        if row.get("deleted_at") not in (None, ""):
            self.moved.report.left(place, "it was deleted")
            return
        if not key or "*" in key or not key.isascii() or not key.isprintable() or " " in key:
            self.moved.report.left(place, "its key is not in the dump")
            return
        user = self._users.get(whole(row.get("user_id")))
        fields: dict[str, Any] = {"name": name}
        partly: list[str] = []
        if user is not None:
            fields["owner"] = key_name(user.get("username"), user.get("email"), f"user {row.get('user_id')}")
        status = whole(row.get("status"))
        gone = user is not None and user.get("deleted_at") not in (None, "")
        blocked = user is not None and whole(user.get("status")) not in (_ENABLED, None)
        if gone or blocked or status not in (_ENABLED, _EXPIRED, _EXHAUSTED):
            fields["enabled"] = False
        expires = whole(row.get("expired_time"))
        if status == _EXPIRED:
            fields["expires"] = max(0, expires or 0)
        elif expires is not None and expires != -1:
            fields["expires"] = max(0, expires)
        self._budget(row, user, fields, partly)
        self._scope(row, user, fields, partly)
        put_key(self.moved, place, sha256(f"sk-{key}"), fields, partly)

    def _budget(self, row: Row, user: Row | None, fields: dict[str, Any], partly: list[str]) -> None:
        """What is left of the token's quota and of its user's, whichever is less."""
        left = [] if truth(row.get("unlimited_quota")) else [whole(row.get("remain_quota")) or 0]
        if user is not None and user.get("quota") not in (None, ""):
            left.append(whole(user["quota"]) or 0)
            tokens = self._tables.get("tokens", [])
            if sum(other.get("user_id") == row.get("user_id") for other in tokens) > 1:
                partly.append("its user's quota was shared by several tokens; each may spend it here")
        unit = _number(self._options.get("QuotaPerUnit", _QUOTA_PER_UNIT))
        if left:
            fields["budget"] = str(money(max(0, min(left)) / (unit if unit > 0 else _QUOTA_PER_UNIT)))

    def _scope(self, row: Row, user: Row | None, fields: dict[str, Any], partly: list[str]) -> None:
        if truth(row.get("model_limits_enabled")):
            fields["models"] = _split(row.get("model_limits"))
        elif row.get("models") not in (None, ""):  # one-api
            fields["models"] = _split(row["models"])
        group = str(row.get("group") or (user or {}).get("group") or "default")
        if group == "auto":
            group = str((user or {}).get("group") or "default")
            partly.append(f"its group auto: it gets the models of {group}")
        allowed = [name for name, groups in self._groups.items() if group in groups]
        if len(allowed) < len(self._groups):
            chosen = fields.get("models", allowed)
            fields["models"] = [name for name in chosen if name in allowed]
        try:
            addresses = str(row.get("allow_ips") or row.get("subnet") or "").replace(",", "\n").split()
            if addresses:
                fields["networks"] = [str(ip_network(address, strict=False)) for address in addresses]
        except ValueError as error:
            fields["enabled"] = False
            partly.append(f"its addresses can't be read ({error}): it is disabled")

    def _rest(self) -> None:
        if self._users:
            self.moved.report.left(
                f"users ({len(self._users)})", "people do not sign in here; their tokens do"
            )
        if options := sorted(self._options.keys() - _READ_OPTIONS):
            self.moved.report.left(f"options ({len(options)})", f"nothing like {', '.join(options)} here")

    def _json(self, text: Any, place: str) -> dict[str, Any]:
        """An object in a column; one that is none is reported, and taken for empty."""
        if text in (None, "", "null"):
            return {}
        try:
            found = json.loads(text)
        except (ValueError, TypeError):
            found = None
        if not isinstance(found, dict):
            self.moved.report.left(place, "it is no JSON object")
            return {}
        return found


def _split(text: Any) -> list[str]:
    parts: Iterable[str] = str(text or "").split(",")
    return [part.strip() for part in parts if part.strip()]


def _number(value: Any) -> Decimal:
    return money(value) or Decimal(0)
