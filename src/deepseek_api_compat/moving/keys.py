"""A key that another program made, as `keys.import` takes it."""

from __future__ import annotations

import hashlib
from typing import Any

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.result import Moved
from deepseek_api_compat.security.key_fields import MAX_ITEMS, MAX_NAME, read_fields


def sha256(credential: str) -> str:
    return hashlib.sha256(credential.encode()).hexdigest()


def key_name(*candidates: Any) -> str:
    """The first of these that can be a name, cut to its longest length."""
    for candidate in candidates:
        text = "".join(char for char in str(candidate or "") if char.isprintable()).strip()[:MAX_NAME]
        if text:
            return text
    raise AssertionError("the last candidate is always a name")


def put_key(moved: Moved, place: str, digest: str, fields: dict[str, Any], partly: list[str]) -> None:
    """Add a key and say what became of it; one that our rules refuse is reported, never let in with less.

    `partly`: what could not be carried of it.
    """
    models = fields.get("models")
    if models is not None and not 0 < len(models) <= MAX_ITEMS:
        # A key must not get all models because its list can't be carried.
        many = f"its {len(models)} models are more than {MAX_ITEMS}" if models else "it may use no model"
        del fields["models"]
        fields["enabled"] = False
        partly.append(f"{many}: it is disabled until its models are set")
    try:
        read_fields("keys.import", fields, -1.0)
    except SetupError as error:
        moved.report.left(place, str(error))
        return
    digest = digest.lower()
    moved.places[digest] = place
    moved.keys.append({"sha256": digest, **fields})
    if partly:
        moved.report.partly(place, "; ".join(partly))
    else:
        moved.report.carried(place)
