"""The ledger in SQL: one row for each admitted request, and sums of them that stay quick to read.

It has a database of its own (`ledger.db` in the data directory, or a PostgreSQL database that a URL names):
its many writes never keep a change of keys waiting, and it can be kept, moved and deleted without the keys.
Amounts of money are integers in micro-units, millionths of the configured currency.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import msgspec
import sqlalchemy as sa

from deepseek_api_compat.store.database import one_sentence, open_database
from deepseek_api_compat.store.ledger_rows import (
    DAY,
    HOUR,
    Batch,
    Filter,
    Grouping,
    LedgerRow,
    Outcome,
    Refusals,
    Spent,
    Usage,
)
from deepseek_api_compat.store.ledger_tables import (
    SCHEMA,
    SUMS,
    add_model_totals,
    add_totals,
    add_usage,
    insert_rows,
    journals,
    ledger,
    model_totals,
    refusals,
    set_position,
    set_refusals,
    totals,
    usage,
)

DATABASE = "ledger.db"


class _Known(Exception):
    """Some rows of a batch are in the ledger already."""


class Ledger:
    """The ledger's database. Calls block: they run in a thread or in a command, never in an event loop.

    Failure policy: every fault of the database is a SetupError of one sentence, and nothing is half done.
    """

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @property
    def file(self) -> Path | None:
        """The SQLite file; None for a database server."""
        name = self._engine.url.database
        return Path(name) if self._engine.dialect.name == "sqlite" and name else None

    def close(self) -> None:
        self._engine.dispose()

    # Taking in

    def position(self, file: str) -> int:
        """Up to which byte a journal's file has been taken in."""
        with self._transaction() as connection:
            return _position(connection, file)

    def take_in(self, batch: Batch) -> int:
        """Record a batch exactly once, however often it comes; returns the file's position afterwards.

        Nothing is recorded if the file's position is not `batch.begin`: go on from what is returned.
        """
        try:
            return self._take_in(batch, batch.rows)
        except _Known:
            return self._take_in(batch, self._unknown(batch.rows))

    def _take_in(self, batch: Batch, rows: Sequence[LedgerRow]) -> int:
        with self._transaction() as connection:
            position = _position(connection, batch.file)
            if position != batch.begin:
                return position
            if rows:
                _insert(connection, rows)
            if batch.refusals:
                set_refusals(connection, _latest(batch.journal, batch.refusals))
            set_position(connection, [(batch.file, batch.end)])
            return batch.end

    def _unknown(self, rows: Sequence[LedgerRow]) -> list[LedgerRow]:
        """Those rows that are not in the ledger, each once."""
        by_id = {row.request_id: row for row in reversed(rows)}
        ids: sa.BindParameter[list[str]] = sa.bindparam("ids", list(by_id), expanding=True)
        with self._transaction() as connection:
            known = connection.execute(sa.select(ledger.c.request_id).where(ledger.c.request_id.in_(ids)))
            for (id,) in known:
                del by_id[id]
        return list(by_id.values())

    def forget(self, file: str) -> None:
        """Its position is not needed any more: the file is gone."""
        with self._transaction() as connection:
            connection.execute(journals.delete().where(journals.c.file == file))

    # Reading

    def rows(self, which: Filter, *, chunk: int = 5000) -> Iterator[LedgerRow]:
        """Rows in order of their start, read `chunk` at a time, so that a long export holds no lock."""
        order = (ledger.c.started, ledger.c.request_id)
        query = sa.select(ledger).where(*_conditions(which)).order_by(*order).limit(chunk)
        after: tuple[Any, ...] | None = None
        while True:
            page = query if after is None else query.where(sa.tuple_(*order) > sa.tuple_(*after))
            with self._transaction() as connection:
                found = connection.execute(page).all()
            for row in found:
                yield LedgerRow(*row)
            if len(found) < chunk:
                return
            after = (found[-1].started, found[-1].request_id)

    def newest(self, which: Filter, limit: int, before: tuple[int, str] | None = None) -> list[LedgerRow]:
        """At most `limit` rows, newest first; `before`: those older than the row of that start and id."""
        order = (ledger.c.started, ledger.c.request_id)
        query = sa.select(ledger).where(*_conditions(which)).limit(limit)
        if before is not None:
            query = query.where(sa.tuple_(*order) < sa.tuple_(*before))
        with self._transaction() as connection:
            found = connection.execute(query.order_by(*(column.desc() for column in order)))
            return [LedgerRow(*row) for row in found]

    def get(self, request_id: str) -> LedgerRow | None:
        with self._transaction() as connection:
            row = connection.execute(sa.select(ledger).where(ledger.c.request_id == request_id)).first()
            return None if row is None else LedgerRow(*row)

    def refusals(self, which: Filter) -> list[Refusals]:
        """Refusals by minute, key and cause, over all workers. Of the filter, times and key are used."""
        columns = (refusals.c.minute, refusals.c.key_id, refusals.c.code)
        query = sa.select(*columns, _sum(refusals.c.count)).group_by(*columns).order_by(*columns)
        if which.since is not None:
            query = query.where(refusals.c.minute >= int(which.since // 60))
        if which.until is not None:
            query = query.where(refusals.c.minute < -int(-which.until // 60))
        if which.key_id is not None:
            query = query.where(refusals.c.key_id == which.key_id)
        with self._transaction() as connection:
            return [Refusals(*row) for row in connection.execute(query)]

    def summary(self, which: Filter, by: Iterable[Grouping], most: int | None = None) -> list[Usage]:
        """Sums of all requests in whole UTC hours that overlap the filter's times, in order of the groups.

        Reads no more than it takes to see that there are over `most` groups.
        """
        columns = _grouping(by)
        sums = [_sum(usage.c[name]).label(name) for name in SUMS]
        query = sa.select(*columns, usage.c.outcome, *sums).group_by(*columns, usage.c.outcome)
        if most is not None:
            query = query.limit(most * len(get_args(Outcome)) + 1)
        with self._transaction() as connection:
            found = connection.execute(query.where(*_hours(which)).order_by(*columns))
            return _folded(found, [column.name for column in columns])

    def spent(self, now: float) -> dict[str, Spent]:
        """What each key that ever had a request has used, as of `now` in unix seconds."""
        return self._spent(now, usage.c.key_id, totals)

    def spent_by_model(self, now: float) -> dict[str, Spent]:
        """What all keys have used of each model that ever had a request."""
        return self._spent(now, usage.c.model, model_totals)

    def _spent(self, now: float, column: sa.Column[str], sums: sa.Table) -> dict[str, Spent]:
        today = int(now // DAY * 24)
        tokens = _sum(usage.c.prompt_tokens + usage.c.completion_tokens)
        of_today = sa.select(column, tokens).where(usage.c.hour >= today).group_by(column)
        with self._transaction() as connection:
            used = {name: count for name, count in connection.execute(of_today)}  # noqa: C416 - rows, not tuples
            found = connection.execute(sa.select(sums.c[column.name], sums.c.price))
            return {name: Spent(price, used.get(name, 0)) for name, price in found}

    def price(self, key_id: str) -> int:
        """What a key has spent in all, in micro-units."""
        with self._transaction() as connection:
            query = sa.select(totals.c.price).where(totals.c.key_id == key_id)
            return int(connection.execute(query).scalar() or 0)

    # Keeping

    def prune(self, before: float, limit: int) -> int:
        """Delete at most `limit` rows that started before `before` (unix seconds), and older refusals."""
        oldest = (
            sa.select(ledger.c.request_id)
            .where(ledger.c.started < int(before * 1000))
            .order_by(ledger.c.started)
            .limit(limit)
        )
        with self._transaction() as connection:
            connection.execute(refusals.delete().where(refusals.c.minute < int(before // 60)))
            return connection.execute(ledger.delete().where(ledger.c.request_id.in_(oldest))).rowcount

    def prune_usage(self, before: float) -> int:
        """Delete the hourly sums of hours that ended before `before`; totals stay."""
        with self._transaction() as connection:
            return connection.execute(usage.delete().where(usage.c.hour < int(before // HOUR))).rowcount

    def differences(self) -> list[str]:
        """Where sums and rows disagree, a sentence each; [] is how it must be. Reads every row."""
        hour = (ledger.c.started // (HOUR * 1000)).label("hour")
        by_row = sa.select(hour, sa.func.count(), _sum(ledger.c.price), _sum(ledger.c.completion_tokens))
        sums = (_sum(usage.c.requests), _sum(usage.c.price), _sum(usage.c.completion_tokens))
        by_hour = sa.select(usage.c.hour, *sums).group_by(usage.c.hour)
        with self._transaction() as connection:
            rows = {row[0]: tuple(row[1:]) for row in connection.execute(by_row.group_by(hour))}
            hours = {row[0]: tuple(row[1:]) for row in connection.execute(by_hour)}
        # Retention deletes row by row: the oldest hour may be there in part, and older ones not at all.
        checked = [number for number in sorted(rows.keys() | hours.keys()) if rows and number > min(rows)]
        return [
            f"Hour {number} (UTC hours since 1970): rows have (requests, price, completion tokens) "
            f"{rows.get(number)}, the sums have {hours.get(number)}."
            for number in checked
            if rows.get(number) != hours.get(number)
        ]

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with one_sentence(self._engine), self._engine.begin() as connection:
            yield connection


def open_ledger(data_dir: Path, url: str | None = None) -> Ledger:
    """Open the ledger, its schema made or upgraded where needed. `data_dir` must exist. Raises SetupError."""
    return Ledger(open_database(data_dir, DATABASE, url, SCHEMA))


def _position(connection: sa.Connection, file: str) -> int:
    query = sa.select(journals.c.position).where(journals.c.file == file)
    return int(connection.execute(query).scalar() or 0)


def _insert(connection: sa.Connection, rows: Sequence[LedgerRow]) -> None:
    """Rows and what they add to the sums. Raises _Known, and so rolls back, if not all of them are new."""
    if insert_rows(connection, [msgspec.structs.astuple(row) for row in rows]) != len(rows):
        raise _Known
    by_hour: dict[tuple[Any, ...], list[int]] = {}
    by_key: dict[tuple[Any, ...], list[int]] = {}
    by_model: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        hour = row.started // (HOUR * 1000)
        _add(by_hour.setdefault((hour, row.key_id, row.model, row.outcome), [0] * len(SUMS)), row)
        _add(by_key.setdefault((row.key_id,), [0] * len(SUMS)), row)
        _add(by_model.setdefault((row.model,), [0] * len(SUMS)), row)
    # Sorted, or two nodes that share a database could wait for each other.
    add_usage(connection, [(*key, *by_hour[key]) for key in sorted(by_hour)])
    add_totals(connection, [(*key, *by_key[key]) for key in sorted(by_key)])
    add_model_totals(connection, [(*key, *by_model[key]) for key in sorted(by_model)])


def _latest(journal: str, found: Sequence[Refusals]) -> list[tuple[Any, ...]]:
    """The last report of each minute, key and cause."""
    latest = {(one.minute, one.key_id, one.code, journal): one.count for one in found}
    return [(*key, latest[key]) for key in sorted(latest)]


def _add(sums: list[int], row: LedgerRow) -> None:
    sums[0] += 1
    sums[1] += row.prompt_tokens
    sums[2] += row.cached_tokens
    sums[3] += row.completion_tokens
    sums[4] += row.reasoning_tokens
    sums[5] += row.price


def _sum(column: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    # PostgreSQL's sum of big integers is a decimal number.
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.BigInteger)


def _conditions(which: Filter) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if which.since is not None:
        found.append(ledger.c.started >= int(which.since * 1000))
    if which.until is not None:
        found.append(ledger.c.started < int(which.until * 1000))
    for name in ("key_id", "model", "outcome"):
        if (value := getattr(which, name)) is not None:
            found.append(ledger.c[name] == value)
    return found


def _hours(which: Filter) -> list[sa.ColumnElement[bool]]:
    found: list[sa.ColumnElement[bool]] = []
    if which.since is not None:
        found.append(usage.c.hour >= int(which.since // HOUR))
    if which.until is not None:
        found.append(usage.c.hour < -int(-which.until // HOUR))
    for name in ("key_id", "model", "outcome"):
        if (value := getattr(which, name)) is not None:
            found.append(usage.c[name] == value)
    return found


def _grouping(by: Iterable[Grouping]) -> list[sa.Label[Any]]:
    columns: dict[Grouping, sa.Label[Any]] = {
        "hour": (usage.c.hour * HOUR).label("start"),
        "day": (usage.c.hour // 24 * DAY).label("start"),
        "key": usage.c.key_id.label("key_id"),
        "model": usage.c.model.label("model"),
    }
    wanted = set(by)
    if {"hour", "day"} <= wanted:
        raise ValueError("by hour or by day, not both")
    return [column for name, column in columns.items() if name in wanted]


def _folded(found: Iterable[Any], names: Sequence[str]) -> list[Usage]:
    """Rows of (groups, outcome, sums) in order of the groups; those of one group become one."""
    folded: list[Usage] = []
    last: Any = None
    width = len(names)
    for row in found:
        group, outcome, sums = row[:width], row[width], row[width + 1 :]
        if group != last:
            last = group
            folded.append(Usage(**dict(zip(names, group, strict=True)), outcomes={}))
        one = folded[-1]
        one.outcomes[outcome] = sums[0]
        one.requests += sums[0]
        one.prompt_tokens += sums[1]
        one.cached_tokens += sums[2]
        one.completion_tokens += sums[3]
        one.reasoning_tokens += sums[4]
        one.price += sums[5]
    return folded
