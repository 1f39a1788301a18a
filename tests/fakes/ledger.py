"""What the ledger of a service holds, read from its database as an operator's own program would."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fakes.service import Service, eventually

Row = dict[str, Any]


@contextmanager
def database(data_dir: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(f"file:{data_dir / 'ledger.db'}?mode=ro", uri=True, timeout=30)) as found:
        found.row_factory = sqlite3.Row
        yield found


def rows(service: Service) -> dict[str, Row]:
    """Every row so far, by its request's id."""
    with database(service.data_dir) as found:
        return {row["request_id"]: dict(row) for row in found.execute("SELECT * FROM ledger")}


def row(service: Service, request_id: str) -> Row:
    """The row of one request, which must come within seconds of the request's end."""
    return dict(eventually(lambda: rows(service).get(request_id), what=f"a row of {request_id}"))


def rows_of_key(service: Service, name: str, count: int) -> list[Row]:
    """All rows of the key of that name, oldest first, once there are at least `count`."""

    def found() -> list[Row] | None:
        mine = [one for one in rows(service).values() if one["key_id"] == id]
        return sorted(mine, key=lambda one: one["started"]) if len(mine) >= count else None

    id = key_id(service, name)
    return list(eventually(found, what=f"{count} rows of {name}")) if count else found() or []


def key_id(service: Service, name: str) -> str:
    with closing(sqlite3.connect(f"file:{service.data_dir / 'deepseek.db'}?mode=ro", uri=True)) as keys:
        [(id,)] = keys.execute("SELECT id FROM keys WHERE name = ?", (name,))
    return str(id)


def spent(service: Service, name: str) -> int:
    """Micro-units in the totals of the key of that name: what its budget is checked against at a start."""
    with database(service.data_dir) as found:
        sums = found.execute("SELECT price FROM totals WHERE key_id = ?", (key_id(service, name),)).fetchone()
    return int(sums["price"]) if sums else 0
