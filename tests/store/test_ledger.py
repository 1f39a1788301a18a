"""The contract of the ledger's database, on SQLite and on PostgreSQL."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.store import ledger_migrations, migrations
from deepseek_api_compat.store.ledger import Ledger, open_ledger
from deepseek_api_compat.store.ledger_rows import Batch, Filter, LedgerRow, Refusals, Spent, Usage
from deepseek_api_compat.store.ledger_tables import SCHEMA, metadata
from deepseek_api_compat.store.sql import open_store

MIDNIGHT = 1_780_012_800  # 2026-05-29 00:00 UTC
HOUR = 3600


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "sqlite" else str(request.getfixturevalue("postgresql_url"))


@pytest.fixture
def store(url: str | None, tmp_path: Path) -> Iterator[Ledger]:
    store = open_ledger(tmp_path, url)
    yield store
    store.close()


def row(id: str, seconds: float = 0.0, **fields: object) -> LedgerRow:
    """A request that began so long after midnight."""
    values: dict[str, object] = {
        "key_id": "alice",
        "token_id": None,
        "endpoint": "/chat/completions",
        "model": "deepseek-v3",
        "replica": 0,
        "status": 200,
        "outcome": "ok",
        "error_code": None,
        "finish": "stop",
        "queue_ms": 1,
        "ttft_ms": 20,
        "total_ms": 300,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 10,
        "reasoning_tokens": 3,
        "sent_tokens": 10,
        "price": 7,
        **fields,
    }
    return LedgerRow(request_id=id, started=int((MIDNIGHT + seconds) * 1000), **values)


def batch(
    begin: int,
    end: int,
    rows: Sequence[LedgerRow] = (),
    refused: Sequence[Refusals] = (),
    file: str = "w0.1.log",
) -> Batch:
    return Batch("w0", file, begin, end, rows, refused)


def test_rows_come_back_as_they_were(store: Ledger) -> None:
    lost = row(
        "b", 1, status=None, outcome="gateway_lost", finish=None, queue_ms=None, ttft_ms=None, total_ms=None
    )
    rows = [row("a"), lost, row("c", 2, token_id="jti-1", replica=None, error_code="timeout")]
    assert store.take_in(batch(0, 10, rows)) == 10
    assert list(store.rows(Filter())) == rows
    assert store.get("b") == lost
    assert store.get("none") is None


def test_a_batch_is_taken_in_once_however_often_it_comes(store: Ledger) -> None:
    for _ in range(3):
        assert store.take_in(batch(0, 10, [row("a")], [Refusals(1, "alice", "over", 5)])) == 10
    assert store.position("w0.1.log") == 10
    assert [found.requests for found in store.summary(Filter(), [])] == [1]
    assert store.spent(MIDNIGHT) == {"alice": Spent(7, 110)}
    assert [found.count for found in store.refusals(Filter())] == [5]


def test_only_what_goes_on_at_the_position_is_taken_in(store: Ledger) -> None:
    store.take_in(batch(0, 10, [row("a")]))
    assert store.take_in(batch(20, 30, [row("c")])) == 10
    assert store.take_in(batch(10, 20, [row("b")])) == 20
    assert [found.request_id for found in store.rows(Filter())] == ["a", "b"]


def test_a_request_in_two_files_counts_once(store: Ledger) -> None:
    store.take_in(batch(0, 10, [row("a"), row("b", 1)]))
    again = [row("b", 1, outcome="gateway_lost"), row("c", 2), row("c", 3)]
    assert store.take_in(batch(0, 1, again, file="w0.live")) == 1
    assert [(found.request_id, found.outcome) for found in store.rows(Filter())] == [
        ("a", "ok"),
        ("b", "ok"),
        ("c", "ok"),
    ]
    assert store.spent(MIDNIGHT)["alice"].price == 21
    assert store.differences() == []


def test_nothing_is_half_done(store: Ledger) -> None:
    broken = row("b", completion_tokens=2**70)  # more than the database can hold
    with pytest.raises((SetupError, OverflowError)):
        store.take_in(batch(0, 10, [row("a"), broken]))
    assert store.position("w0.1.log") == 0
    assert list(store.rows(Filter())) == []
    assert store.spent(MIDNIGHT) == {}


def test_a_minute_of_refusals_is_reported_again_with_a_count_that_grew(store: Ledger) -> None:
    store.take_in(batch(0, 1, refused=[Refusals(60, "alice", "over", 2), Refusals(60, "alice", "over", 5)]))
    store.take_in(batch(1, 2, refused=[Refusals(60, "alice", "over", 4), Refusals(61, "alice", "over", 1)]))
    other = Batch(
        "w1", "w1.1.log", 0, 1, [], [Refusals(60, "alice", "over", 10), Refusals(60, "bob", "budget", 1)]
    )
    store.take_in(other)
    assert store.refusals(Filter()) == [
        Refusals(60, "alice", "over", 15),
        Refusals(60, "bob", "budget", 1),
        Refusals(61, "alice", "over", 1),
    ]
    assert store.refusals(Filter(key_id="bob", since=3600, until=3660)) == [Refusals(60, "bob", "budget", 1)]
    assert store.refusals(Filter(since=3660, until=3700)) == [Refusals(61, "alice", "over", 1)]


def test_a_summary_by_key_model_hour_and_day(store: Ledger) -> None:
    rows = [
        row("a", 10),
        row("b", 20, outcome="error"),
        row("c", HOUR, key_id="bob", model="r1"),
        row("d", 24 * HOUR),
    ]
    store.take_in(batch(0, 1, rows))
    whole = store.summary(Filter(), [])
    assert whole == [
        Usage(
            requests=4,
            prompt_tokens=400,
            cached_tokens=160,
            completion_tokens=40,
            reasoning_tokens=12,
            price=28,
            outcomes={"ok": 3, "error": 1},
        )
    ]
    assert [(one.key_id, one.model, one.requests) for one in store.summary(Filter(), ["key", "model"])] == [
        ("alice", "deepseek-v3", 3),
        ("bob", "r1", 1),
    ]
    assert [(one.start, one.requests, one.outcomes) for one in store.summary(Filter(), ["hour"])] == [
        (MIDNIGHT, 2, {"ok": 1, "error": 1}),
        (MIDNIGHT + HOUR, 1, {"ok": 1}),
        (MIDNIGHT + 24 * HOUR, 1, {"ok": 1}),
    ]
    assert [(one.start, one.requests) for one in store.summary(Filter(), ["day"])] == [
        (MIDNIGHT, 3),
        (MIDNIGHT + 24 * HOUR, 1),
    ]
    part = Filter(since=MIDNIGHT + 30, until=MIDNIGHT + HOUR + 1, outcome="ok")
    assert [one.requests for one in store.summary(part, [])] == [2]  # whole hours
    assert [one.requests for one in store.summary(Filter(key_id="alice", model="deepseek-v3"), [])] == [3]
    with pytest.raises(ValueError, match="not both"):
        store.summary(Filter(), ["hour", "day"])


def test_spent_is_all_of_the_money_and_today_s_tokens(store: Ledger) -> None:
    rows = [row("a", -1), row("b", 1), row("c", 2, key_id="bob", price=10**15)]
    store.take_in(batch(0, 1, rows))
    assert store.spent(MIDNIGHT + 5) == {"alice": Spent(14, 110), "bob": Spent(10**15, 110)}


def test_spent_by_model_is_that_of_all_keys_and_stays(store: Ledger) -> None:
    rows = [
        row("a", -1),
        row("b", 1),
        row("c", 2, key_id="bob", price=3),
        row("d", 2, model="other", price=1),
    ]
    store.take_in(batch(0, 1, rows))
    expected = {"deepseek-v3": Spent(17, 220), "other": Spent(1, 110)}
    assert store.spent_by_model(MIDNIGHT + 5) == expected
    store.prune_usage(MIDNIGHT + 2 * HOUR)
    assert {name: one.price for name, one in store.spent_by_model(MIDNIGHT).items()} == {
        name: one.price for name, one in expected.items()
    }


def test_an_older_ledger_begins_the_totals_of_models_with_its_sums_by_hour(
    url: str | None, tmp_path: Path
) -> None:
    old = open_ledger(tmp_path, url)
    old.take_in(batch(0, 1, [row("a", -1), row("b", 1, outcome="error"), row("c", 2, model="other")]))
    with old._transaction() as connection:
        connection.execute(sa.text("DROP TABLE model_totals"))
        connection.execute(sa.text(f"UPDATE {SCHEMA.version_table} SET version_num = '0001'"))
    old.close()
    new = open_ledger(tmp_path, url)
    assert new.spent_by_model(MIDNIGHT) == {"deepseek-v3": Spent(14, 110), "other": Spent(7, 110)}
    new.take_in(batch(1, 2, [row("d")]))
    assert new.spent_by_model(MIDNIGHT)["deepseek-v3"].price == 21
    new.close()


def test_rows_are_read_in_pages_and_filtered(store: Ledger) -> None:
    same_moment = [row(f"{number:03}", number // 3, key_id="ab"[number % 2]) for number in range(20)]
    store.take_in(batch(0, 1, same_moment))
    assert list(store.rows(Filter(), chunk=3)) == same_moment
    assert len(list(store.rows(Filter(key_id="a")))) == 10
    part = Filter(since=MIDNIGHT + 1, until=MIDNIGHT + 2)
    assert [found.request_id for found in store.rows(part)] == ["003", "004", "005"]
    assert list(store.rows(Filter(model="other"))) == []


def test_the_newest_rows_come_first_and_pages_follow_one_another(store: Ledger) -> None:
    same_moment = [row(f"{number:03}", number // 3, key_id="ab"[number % 2]) for number in range(10)]
    store.take_in(batch(0, 1, same_moment))
    found: list[LedgerRow] = []
    before = None
    while page := store.newest(Filter(), 4, before):
        found += page
        before = page[-1].started, page[-1].request_id
    assert found == same_moment[::-1]
    assert [one.request_id for one in store.newest(Filter(key_id="a"), 2)] == ["008", "006"]


def test_a_summary_of_too_many_groups_stops_early(store: Ledger) -> None:
    store.take_in(batch(0, 1, [row(f"{number}", key_id=f"k{number:02}") for number in range(30)]))
    assert len(store.summary(Filter(), ["key"], most=30)) == 30
    assert 2 < len(store.summary(Filter(), ["key"], most=2)) < 30


def test_the_price_of_a_key_is_what_it_spent_in_all(store: Ledger) -> None:
    store.take_in(batch(0, 1, [row("a", -1), row("b", 1), row("c", key_id="bob", price=10**15)]))
    assert [store.price(key) for key in ("alice", "bob", "carol")] == [14, 10**15, 0]


def test_old_rows_are_deleted_in_batches_and_sums_stay(store: Ledger) -> None:
    rows = [row(str(number), number) for number in range(10)]
    store.take_in(batch(0, 1, rows, [Refusals(MIDNIGHT // 60 - 1, "alice", "over", 1)]))
    assert store.prune(MIDNIGHT + 8, 5) == 5
    assert store.prune(MIDNIGHT + 8, 5) == 3
    assert [found.request_id for found in store.rows(Filter())] == ["8", "9"]
    assert store.refusals(Filter()) == []
    assert [found.requests for found in store.summary(Filter(), [])] == [10]
    assert store.differences() == []  # an hour that is deleted in part is no difference
    assert store.prune_usage(MIDNIGHT + HOUR) == 1
    assert store.summary(Filter(), []) == []
    assert store.spent(MIDNIGHT)["alice"].price == 70


def test_differences_are_found(store: Ledger, url: str | None, tmp_path: Path) -> None:
    store.take_in(batch(0, 1, [row("a"), row("b", HOUR), row("c", HOUR)]))
    assert store.differences() == []
    with store._transaction() as connection:
        connection.execute(sa.text("DELETE FROM ledger WHERE request_id = 'c'"))
    (difference,) = store.differences()
    assert "(1, 7, 10), the sums have (2, 14, 20)" in difference


def test_a_forgotten_file_begins_anew(store: Ledger) -> None:
    store.take_in(batch(0, 10))
    store.forget("w0.1.log")
    assert store.position("w0.1.log") == 0


def test_names_of_any_length_and_script(store: Ledger) -> None:
    odd = row("a", model="深度" * 100, token_id="x" * 1000, error_code="'; DROP TABLE ledger; --")
    store.take_in(batch(0, 1, [odd]))
    assert list(store.rows(Filter(model="深度" * 100))) == [odd]


def test_migrations_make_the_schema_that_the_code_uses(store: Ledger) -> None:
    with store._engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": SCHEMA.version_table})
        assert compare_metadata(context, metadata) == []
    scripts = ScriptDirectory.from_config(migrations.config(location=ledger_migrations.HERE))
    assert scripts.get_current_head() == SCHEMA.head


def test_keys_and_ledger_may_share_a_database(postgresql_url: str, tmp_path: Path) -> None:
    open_store(tmp_path, postgresql_url).close()
    store = open_ledger(tmp_path, postgresql_url)
    store.take_in(batch(0, 1, [row("a")]))
    store.close()
    keys = open_store(tmp_path, postgresql_url)
    assert keys.list() == []
    keys.close()


def test_a_password_is_not_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(SetupError) as caught:
        open_ledger(tmp_path, f"postgresql+psycopg://me:hidden@/x?host={tmp_path}")
    assert "hidden" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["nonsense", "no-such-dialect://x"])
def test_a_url_that_is_none_is_one_sentence(tmp_path: Path, url: str) -> None:
    with pytest.raises(SetupError, match="database URL"):
        open_ledger(tmp_path, url)
