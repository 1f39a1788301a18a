"""The tables of the ledger's database, and the statements that fill them.

ledger    a request's whole story; deleted after the retention time
refusals  how often a key was refused, by minute and cause; deleted with the ledger
usage     sums by hour, key, model and outcome
totals    sums by key, for ever: what budgets are checked against; model_totals the same by model
journals  how far each journal file has been taken in
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa

from deepseek_api_compat.store.database import Schema

SCHEMA = Schema("0002", "ledger_version", "deepseek_api_compat.store.ledger_migrations")
SUMS = ("requests", "prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "price")


def _counts(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.BigInteger, nullable=False) for name in names]


metadata = sa.MetaData()

# Text without a length: SQLite ignores lengths, and a name too long for PostgreSQL would stop the intake.
ledger = sa.Table(
    "ledger",
    metadata,
    sa.Column("request_id", sa.Text, primary_key=True),
    sa.Column("started", sa.BigInteger, nullable=False),
    sa.Column("key_id", sa.Text, nullable=False),
    sa.Column("token_id", sa.Text),
    sa.Column("endpoint", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("replica", sa.Integer),
    sa.Column("status", sa.Integer),
    sa.Column("outcome", sa.Text, nullable=False),
    sa.Column("error_code", sa.Text),
    sa.Column("finish", sa.Text),
    sa.Column("queue_ms", sa.BigInteger),
    sa.Column("ttft_ms", sa.BigInteger),
    sa.Column("total_ms", sa.BigInteger),
    *_counts(*SUMS[1:5], "sent_tokens", "price"),
    sa.Index("ledger_started", "started"),
    sa.Index("ledger_key_started", "key_id", "started"),
    sa.Index("ledger_model_started", "model", "started"),
)

refusals = sa.Table(
    "refusals",
    metadata,
    sa.Column("minute", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("code", sa.Text, primary_key=True),
    sa.Column("journal", sa.Text, primary_key=True),
    *_counts("count"),
)

usage = sa.Table(
    "usage",
    metadata,
    sa.Column("hour", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("key_id", sa.Text, primary_key=True),
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("outcome", sa.Text, primary_key=True),
    *_counts(*SUMS),
)

totals = sa.Table("totals", metadata, sa.Column("key_id", sa.Text, primary_key=True), *_counts(*SUMS))

model_totals = sa.Table(
    "model_totals", metadata, sa.Column("model", sa.Text, primary_key=True), *_counts(*SUMS)
)

journals = sa.Table("journals", metadata, sa.Column("file", sa.Text, primary_key=True), *_counts("position"))


_ARRAYS = {sa.Text: "text[]", sa.Integer: "int[]", sa.BigInteger: "bigint[]"}


class Upsert:
    """Inserts many rows by one statement; `tail` says what happens to those that are there already.

    Of the dialects, SQLite and PostgreSQL.
    """

    def __init__(self, table: sa.Table, tail: str) -> None:
        types = [_ARRAYS[type(column.type)] for column in table.columns]
        into = f"INSERT INTO {table.name} ({', '.join(table.columns.keys())})"
        arrays = ", ".join(f"%s::{name}" for name in types)
        key = ", ".join(table.primary_key.columns.keys())
        self._sqlite = f"{into} VALUES ({', '.join('?' * len(types))}) ON CONFLICT ({key}) {tail}"
        # One array for each column: twice as fast as a statement for each row.
        self._postgresql = f"{into} SELECT * FROM unnest({arrays}) ON CONFLICT ({key}) {tail}"  # noqa: S608

    def __call__(self, connection: sa.Connection, rows: Sequence[tuple[Any, ...]]) -> int:
        """`rows`: values in the order of the columns, no two with one key. Returns how many were written."""
        if connection.dialect.name == "sqlite":
            return connection.exec_driver_sql(self._sqlite, list(rows)).rowcount
        columns = tuple(list(column) for column in zip(*rows, strict=True))
        return connection.exec_driver_sql(self._postgresql, columns).rowcount


def _adding(table: sa.Table) -> Upsert:
    sums = (f"{name} = {table.name}.{name} + excluded.{name}" for name in SUMS)
    return Upsert(table, f"DO UPDATE SET {', '.join(sums)}")


insert_rows = Upsert(ledger, "DO NOTHING")
add_usage = _adding(usage)
add_totals = _adding(totals)
add_model_totals = _adding(model_totals)
# A journal reports the same minute again with a count that has grown; nothing is added up here.
set_refusals = Upsert(refusals, "DO UPDATE SET count = excluded.count WHERE excluded.count > refusals.count")
set_position = Upsert(journals, "DO UPDATE SET position = excluded.position")
