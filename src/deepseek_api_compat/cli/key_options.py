"""Options of `deepseek-api keys` that say what a key may do, and how durations and dates are written."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

LIMITS: dict[str, tuple[Callable[[str], float], str]] = {
    "rps": (float, "requests per second"),
    "burst": (int, "requests that may come at once"),
    "rpm": (int, "requests per minute"),
    "tpm": (int, "tokens per minute"),
    "tpd": (int, "tokens per day (UTC)"),
    "concurrency": (int, "requests at a time"),
}
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def add_field_options(parser: argparse.ArgumentParser) -> None:
    """The options that `keys create` and `keys update` share; `fields_of` reads them."""
    # Left out of the result where not given: None is a value, as in "--expires never".
    options = parser.add_argument_group("what the key is for", argument_default=argparse.SUPPRESS)
    options.add_argument("--role", choices=("user", "admin", "metrics"), help="a new key's is user")
    options.add_argument("--owner", metavar="TEXT", type=printable, help="who answers for it")
    options.add_argument(
        "--expires", metavar="WHEN", type=moment, help="30d, 12h, 2030-12-31, 2030-12-31T18:00 (UTC) or never"
    )
    options.add_argument(
        "--models", metavar="NAME,...", type=items, help="models that it may use, or all (a new key's)"
    )
    options.add_argument(
        "--allow",
        metavar="CIDR,...",
        type=items,
        dest="networks",
        help="networks that it may be used from, such as 10.0.0.0/8, or all (a new key's)",
    )
    options.add_argument(
        "--budget", metavar="MONEY", type=_or("none", str), help="what it may spend in all, or none: any sum"
    )
    for name, (number, help) in LIMITS.items():
        options.add_argument(
            f"--{name}",
            metavar="N",
            type=_or("default", number),
            help=f"{help}; 0: no limit; default: as configured",
        )


def fields_of(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters of `keys.create` and `keys.update` that were given, but for the name."""
    given = vars(args)
    names = ("role", "owner", "expires", "models", "networks", "budget")
    fields = {name: given[name] for name in names if name in given}
    limits = {name: given[name] for name in LIMITS if name in given}
    return {**fields, "limits": limits} if limits else fields


def printable(text: str) -> str:
    # Bytes of an argument that are not text arrive as lone surrogates, which no encoder takes.
    if not text.isprintable():
        raise argparse.ArgumentTypeError("it is not printable text")
    return text


def duration(text: str) -> int:
    """Seconds: 90, 90s, 15m, 12h or 30d."""
    found = re.fullmatch(r"([0-9]{1,9})([smhd]?)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 15m, 12h or 30d")
    return int(found[1]) * _UNITS[found[2]]


def moment(text: str) -> int | None:
    """Unix seconds: a duration from now, or a date, or a date and time (UTC unless it says otherwise)."""
    if text == "never":
        return None
    if re.fullmatch("[0-9]+[smhd]", text):
        return int(time.time()) + duration(text)
    try:
        found = datetime.fromisoformat(re.sub("Z$", "+00:00", text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; write 30d, 2030-12-31 or never") from None
    return int((found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp())


def items(text: str) -> list[str] | None:
    """Names between commas; None for `all`."""
    return None if text == "all" else [item.strip() for item in printable(text).split(",")]


def _or(word: str, read: Callable[[str], Any]) -> Callable[[str], Any]:
    """A type of argument that reads `word` as None."""

    def convert(text: str) -> Any:
        return None if text == word else read(text)

    convert.__name__ = f"number (or {word})"  # argparse says "invalid ... value"
    return convert
