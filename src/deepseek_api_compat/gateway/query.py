"""Parameters in the query of an address: what is unknown, given twice or malformed is a 400 that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime, timezone
from typing import TypeVar
from urllib.parse import parse_qsl

from deepseek_api_compat.errors import InvalidRequest

T = TypeVar("T")
MAX_PAGE = 1000  # items of one page of a list
MAX_TIME = 253_402_300_799.0  # unix seconds; the end of the year 9999
Read = Callable[[str], T]


class Query:
    """The parameters of one request, as text. Every method raises InvalidRequest."""

    def __init__(self, query_string: bytes, known: Iterable[str]) -> None:
        """`known`: the names of all parameters that the route has."""
        try:
            pairs = parse_qsl(
                query_string.decode(), keep_blank_values=True, errors="strict", max_num_fields=100
            )
        except ValueError:
            raise InvalidRequest("The query of the address can't be read.") from None
        known = sorted(known)
        self._given: Mapping[str, str] = dict(pairs)
        for name, _ in pairs:
            if name not in known:
                allowed = ", ".join(known) or "none"
                raise InvalidRequest(
                    f"There is no parameter `{name[:40]}`; known are: {allowed}.", param=name[:40]
                )
        if len(self._given) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InvalidRequest(f"`{twice}` is given twice.", param=twice)

    def get(self, name: str, read: Read[T]) -> T | None:
        """What `read` makes of `name`, None if it isn't given. `read` raises ValueError: what it must be."""
        given = self._given.get(name)
        if given is None:
            return None
        try:
            return read(given)
        except ValueError as error:
            raise InvalidRequest(f"`{name}` must be {error}.", param=name) from None


def text(value: str) -> str:
    """A name of some kind."""
    if not 0 < len(value) <= 200 or not value.isprintable():
        raise ValueError("1 to 200 printable characters")
    return value


def number(least: int, most: int) -> Read[int]:
    """Reads integers in a range."""

    def read(value: str) -> int:
        if not (value.isascii() and value.isdigit() and len(value) < 20 and least <= int(value) <= most):
            raise ValueError(f"an integer between {least} and {most}")
        return int(value)

    return read


def one_of(*words: str) -> Read[str]:
    def read(value: str) -> str:
        if value not in words:
            raise ValueError(" or ".join((", ".join(words[:-1]), words[-1])))
        return value

    return read


def moment(value: str) -> float:
    """Unix seconds: as such, or as an ISO 8601 date, or date and time (UTC unless it has an offset)."""
    try:
        if value.isascii() and value.isdigit():
            seconds = float(value)
        else:
            # A plus sign in a query is a space.
            found = datetime.fromisoformat(value.replace(" ", "+").replace("Z", "+00:00"))
            seconds = (found if found.tzinfo else found.replace(tzinfo=timezone.utc)).timestamp()
        if not 0 <= seconds <= MAX_TIME:
            raise ValueError
    except (ValueError, OverflowError):
        raise ValueError("a time: 2026-11-01, 2026-11-01T12:00Z or unix seconds") from None
    return seconds
