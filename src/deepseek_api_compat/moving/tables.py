"""Rows of the tables that are needed, from whatever form a database was given in."""

from __future__ import annotations

import csv
import json
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.moving.sql_dump import Row, read_dump

_SQLITE = b"SQLite format 3\x00"


def read_tables(path: Path, tables: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of each table that is there; a CSV or JSON file is the first one. Raises SetupError."""
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise SetupError(f"Can't read {path}: {error.strerror}.") from None
    if head == _SQLITE:
        return _sqlite(path, tables)
    if path.suffix.lower() == ".csv":
        return {tables[0]: _csv(path)}
    if path.suffix.lower() in {".json", ".jsonl"}:
        return {tables[0]: _json(path)}
    found: dict[str, list[Row]] = {}
    for table, row in read_dump(path, tables):
        found.setdefault(table, []).append(row)
    if not found:
        raise SetupError(f"{path} has no rows of the tables {', '.join(tables)}: is it the right dump?")
    return found


def _sqlite(path: Path, tables: Sequence[str]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    table = "sqlite_master"
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            connection.row_factory = sqlite3.Row
            known = {str(row[0]) for row in connection.execute("SELECT name FROM sqlite_master")}
            for table in tables:
                if table in known:
                    rows = connection.execute(f'SELECT * FROM "{table}"')  # noqa: S608 - names of our own
                    found[table] = [dict(row) for row in rows]
    except sqlite3.Error as error:
        raise SetupError(f"{path}, table {table}: {error}.") from None
    if not found:
        raise SetupError(f"{path} has none of the tables {', '.join(tables)}: is it the right database?")
    return found


def _csv(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            rows: list[Row] = []
            for row in reader:
                if None in row or None in row.values():
                    raise SetupError(f"{path}, line {reader.line_num}: not as many values as columns.")
                rows.append({name: value or None for name, value in row.items()})
            return rows
    except (csv.Error, UnicodeDecodeError) as error:
        raise SetupError(f"{path} is not valid CSV: {error}.") from None


def _json(path: Path) -> list[Row]:
    """An array of objects, an object with the array `keys`, or one object a line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            found: Any = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            found = json.loads(text)
    except ValueError as error:
        raise SetupError(f"{path} is not valid JSON: {error}.") from None
    if isinstance(found, dict):
        found = found.get("keys")
    if not isinstance(found, list) or not all(isinstance(row, dict) for row in found):
        raise SetupError(f"{path} holds no array of objects.")
    return found
