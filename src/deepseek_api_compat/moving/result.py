"""What comes out of moving: models, prices and keys, and how they are written as files.

Secrets of upstreams never stand in the configuration: it names variables, whose values are in a file of
their own that only its owner can read.
"""

from __future__ import annotations

import json
import os
import shlex
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.report import Report

_MICRO = Decimal("0.000001")


@dataclass
class Model:
    """A `[[models]]` table; `engines` and `limits` as the configuration has them."""

    name: str
    engines: list[dict[str, Any]] = field(default_factory=list)
    aliases: list[str] = field(default_factory=list)
    fallback: list[str] = field(default_factory=list)
    limits: dict[str, Any] = field(default_factory=dict)
    routing: str | None = None


@dataclass
class Moved:
    """`prices`: of a million tokens, by model. `keys`: as `keys.import` takes them; `places`: of
    each sha256, what the report calls it. `secrets`: variables and their values. `groups`: models by
    the name of their access group."""

    report: Report = field(default_factory=Report)
    models: dict[str, Model] = field(default_factory=dict)
    prices: dict[str, dict[str, Decimal]] = field(default_factory=dict)
    allow: list[str] = field(default_factory=list)
    keys: list[dict[str, Any]] = field(default_factory=list)
    groups: dict[str, list[str]] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, str] = field(default_factory=dict)

    def model(self, name: str) -> Model:
        return self.models.setdefault(name, Model(name))

    def secret(self, value: str) -> str:
        """The name of the variable for an upstream's key, the same for the same key."""
        for name, known in self.secrets.items():
            if known == value:
                return name
        name = f"IMPORTED_UPSTREAM_KEY_{len(self.secrets) + 1}"
        self.secrets[name] = value
        return name

    def toml(self, origin: str) -> str:
        """The configuration."""
        lines = [f"# Made by deepseek-api import from {origin}; see docs/import.md."]
        if self.allow:
            lines += ["", "[network]", f"allow = {_toml(self.allow)}"]
        for model in self.models.values():
            lines += ["", "[[models]]", f"name = {_toml(model.name)}"]
            for name in ("aliases", "fallback", "routing"):
                if value := getattr(model, name):
                    lines.append(f"{name} = {_toml(value)}")
            if model.limits:
                lines += ["[models.limits]", *_pairs(model.limits)]
            for engine in model.engines:
                lines += ["", "[[models.engines]]", *_pairs(engine)]
        for name, price in self.prices.items():
            lines += ["", "[[prices]]", f"model = {_toml(name)}", *_pairs(price)]
        return "\n".join(lines) + "\n"

    def environment(self) -> str:
        """Lines that a shell reads with `set -a; . FILE`."""
        return "".join(f"{name}={shlex.quote(value)}\n" for name, value in self.secrets.items())


def money(value: Any) -> Decimal | None:
    """A sum or price with 6 decimals; None if it is no number or below 0."""
    try:
        found = Decimal(str(value))
        return found.quantize(_MICRO, ROUND_HALF_UP) if found.is_finite() and found >= 0 else None
    except InvalidOperation:
        return None


def whole(value: Any) -> int | None:
    """A whole number out of a table or a file; None if it is none."""
    try:
        return None if value is None or value == "" else int(Decimal(str(value)))
    except (InvalidOperation, ValueError, OverflowError):
        return None


def truth(value: Any) -> bool:
    """A boolean as any of the databases writes it."""
    return str(value).lower() in {"1", "t", "true", "\x01"}


def no_circles(moved: Moved) -> None:
    """Leave out fallbacks to models that are not there, and those that would close a circle."""
    wanted = {name: model.fallback for name, model in moved.models.items()}
    for model in moved.models.values():
        model.fallback = []
    for model in moved.models.values():
        for name in wanted[model.name]:
            if name not in moved.models:
                moved.report.left(f"fallback {model.name} -> {name}", "there is no such model")
            elif name == model.name or model.name in _reached(moved, name):
                moved.report.left(f"fallback {model.name} -> {name}", "it would close a circle")
            elif name not in model.fallback:
                model.fallback.append(name)
                moved.report.carried(f"fallback {model.name} -> {name}")


def _reached(moved: Moved, start: str) -> set[str]:
    found: set[str] = set()
    open_ = [start]
    while open_:
        for name in moved.models[open_.pop()].fallback:
            if name not in found and name in moved.models:
                found.add(name)
                open_.append(name)
    return found


def check_places(texts: dict[Path, str], *, force: bool) -> None:
    """Raises SetupError where a file can't be, or, unless forced, one is that says something else."""
    for path, text in texts.items():
        if not os.access(path.parent, os.W_OK):
            raise SetupError(f"Can't write {path}: there is no such directory, or it is not yours.")
        if path.is_dir() or (path.exists() and not force and path.read_bytes() != text.encode()):
            raise SetupError(f"{path} exists already: give another --output, or --force to replace it.")


def write_files(texts: dict[Path, str]) -> None:
    """Write each file as a whole, readable by its owner only. Raises SetupError."""
    for path, text in texts.items():
        try:
            with tempfile.NamedTemporaryFile("w", dir=path.parent, encoding="utf-8", delete=False) as file:
                file.write(text)  # made with mode 0600
            os.replace(file.name, path)
        except OSError as error:
            raise SetupError(f"Can't write {path}: {error.strerror}.") from None


def _pairs(table: dict[str, Any]) -> Iterable[str]:
    return (f"{name} = {_toml(value)}" for name, value in table.items())


def _toml(value: Any) -> str:
    if isinstance(value, Decimal):
        return json.dumps(format(value.normalize(), "f"))
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
