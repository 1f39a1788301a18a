"""What a worker writes down: rows in flight, the log, room, and the disk."""

import asyncio
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.errors import LedgerUnavailable
from deepseek_api_compat.gateway import journal as journal_module
from deepseek_api_compat.gateway.journal import MOST, Entry, Journal
from deepseek_api_compat.gateway.journal_files import (
    COMPLETION,
    MAX_RECORD,
    PART,
    ROW,
    ROWS,
    SEGMENT,
    SENT,
    read_live,
    scan_log,
)
from deepseek_api_compat.gateway.prices import FREE, Price
from fakes.limited_files import files_limited_to

PRICE = Price(prompt=1_000_000, cached=500_000, completion=2_000_000)


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(tmp_path, 0, LedgerSettings())
    yield journal
    journal.close()


def admit(journal: Journal, id: str = "req-1", **fields: str | None) -> Entry:
    key_id, token_id = fields.get("key_id", "alice"), fields.get("token_id")
    return journal.admit(id, 1000, key_id, token_id, "/chat/completions", "deepseek-v3", PRICE)


def in_flight(journal: Journal) -> list[tuple[int, int, bytes]]:
    data = (journal._directory / f"{journal.name}.live").read_bytes()
    return [(row.counters[SENT], row.counters[COMPLETION], row.payload) for row in read_live(data) if row]


def logged(journal: Journal) -> list[bytes]:
    paths = sorted(journal._directory.glob("*.log"))
    return [one for path in paths for one in scan_log(path.read_bytes(), dead=False, limit=10**6).payloads]


def test_a_request_is_in_the_table_until_it_is_in_the_log(journal: Journal) -> None:
    entry = admit(journal)
    assert [(sent, made) for sent, made, _ in in_flight(journal)] == [(0, 0)]
    assert b"req-1" in in_flight(journal)[0][2]
    entry.made(10, 4, 3, 1)
    entry.sent(1)
    entry.sent(2)
    assert [(sent, made) for sent, made, _ in in_flight(journal)] == [(3, 3)]
    assert logged(journal) == []
    entry.settle("ok", 200, 5, finish="stop")
    assert in_flight(journal) == []
    assert len(logged(journal)) == 1


def test_settling_tells_the_price(journal: Journal) -> None:
    entry = admit(journal)
    entry.made(10, 4, 3, 1)
    assert entry.settle("ok", 200, 5) == 6 + 2 + 6


def test_a_late_call_does_not_count_for_the_row_s_next_request(journal: Journal) -> None:
    first = admit(journal, "first")
    first.settle("ok", 200, 5)
    admit(journal, "second")
    first.sent(100)
    first.made(1, 1, 1, 1)
    assert [(sent, made) for sent, made, _ in in_flight(journal)] == [(0, 0)]


def test_the_table_is_locked_as_long_as_its_worker_lives(journal: Journal, tmp_path: Path) -> None:
    file = os.open(tmp_path / f"{journal.name}.live", os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(file)


def test_files_are_private(journal: Journal, tmp_path: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


def test_the_table_grows_with_the_requests_in_flight(journal: Journal, tmp_path: Path) -> None:
    entries = [admit(journal, f"req-{number}") for number in range(ROWS + 1)]
    for entry in entries:
        entry.sent(1)
    assert (tmp_path / f"{journal.name}.live").stat().st_size == 2 * PART
    assert sorted(sent for sent, _, _ in in_flight(journal)) == [1] * (ROWS + 1)
    for entry in entries:
        entry.settle("ok", 200, 1)
    assert in_flight(journal) == []
    assert len(logged(journal)) == ROWS + 1


def test_the_log_goes_on_in_the_next_segment(journal: Journal, tmp_path: Path) -> None:
    number = 0
    while len(list(tmp_path.glob("*.log"))) < 3:
        admit(journal, f"req-{number}", key_id="k" * 800).settle("ok", 200, 1)
        number += 1
    assert len(logged(journal)) == number
    first = scan_log(min(tmp_path.glob("*.log")).read_bytes(), dead=False, limit=10**6)
    assert first.ended


@pytest.mark.parametrize("odd", ["\ud800", "x" * 10_000, "深" * 1000, "\0"])
def test_no_text_keeps_a_request_from_being_written_down(journal: Journal, odd: str) -> None:
    entry = admit(journal, token_id=odd)
    assert len(in_flight(journal)) == 1
    entry.settle("error", 502, 1, error_code=odd, finish=odd)
    assert len(logged(journal)) == 1
    assert len(logged(journal)[0]) <= MAX_RECORD


@pytest.mark.parametrize("count", [-5, 2**70, MOST + 1])
def test_counts_that_can_not_be_are_made_plausible(journal: Journal, count: int) -> None:
    entry = admit(journal)
    entry.made(count, count, count, count)
    expected = PRICE.of(MOST, MOST, MOST) if count > 0 else 0
    assert entry.settle("ok", 200, 1) == expected


def test_refusals_are_counted_by_the_minute(journal: Journal, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 600.0
    monkeypatch.setattr(journal_module.time, "time", lambda: now)
    for _ in range(3):
        journal.refused("alice", "rate_limit_exceeded")
    journal.refused("alice", "insufficient_quota")
    assert sorted(sent for sent, _, _ in in_flight(journal)) == [1, 3]
    assert logged(journal) == []
    now = 660.0
    journal.refused("alice", "rate_limit_exceeded")
    assert [sent for sent, _, _ in in_flight(journal)] == [1]
    assert len(logged(journal)) == 2


@pytest.mark.parametrize("policy", ["serve", "refuse"])
def test_a_full_disk_keeps_what_was_promised(tmp_path: Path, policy: str) -> None:
    journal = Journal(tmp_path, 0, LedgerSettings(when_unavailable=policy))  # type: ignore[arg-type]
    admitted: list[Entry] = []
    refused = 0
    with files_limited_to(0):
        for number in range(2 * ROWS):
            try:
                admitted.append(admit(journal, f"req-{number}"))
            except LedgerUnavailable:
                refused += 1
        for entry in admitted:
            entry.made(1, 0, 1, 0)
            assert entry.settle("ok", 200, 1) == 3  # the price is known even where nothing is written down
    assert journal.problem is not None
    assert "can't grow" in journal.problem
    assert len(logged(journal)) == ROWS
    assert (journal.unrecorded, refused) == ((ROWS, 0) if policy == "serve" else (0, ROWS))
    journal._retry = 0.0  # a second later
    admit(journal, "later").settle("ok", 200, 1)
    for number in range(2 * ROWS):
        admit(journal, f"again-{number}")
    assert journal.problem is None
    assert journal.unrecorded == (ROWS if policy == "serve" else 0)
    journal.close()


def test_a_journal_that_could_not_be_made_is_made_later(tmp_path: Path) -> None:
    with files_limited_to(0):
        journal = Journal(tmp_path, 0, LedgerSettings(when_unavailable="refuse"))
        with pytest.raises(LedgerUnavailable):
            admit(journal)
        journal.refused("alice", "over")
    assert list(tmp_path.iterdir()) == []
    assert journal.unrecorded == 1
    journal._retry = 0.0
    admit(journal).settle("ok", 200, 1)
    assert len(logged(journal)) == 1
    journal.close()


def fill(journal: Journal) -> int:
    """Settle requests, with large records, until one is refused; returns how many were not."""
    for number in range(10**5):
        try:
            entry = admit(journal, f"req-{number}", key_id="k" * 800)
        except LedgerUnavailable:
            return number
        entry.settle("ok", 200, 1)
    pytest.fail("the journal has no end")


def test_journals_grow_up_to_their_limit(tmp_path: Path) -> None:
    settings = LedgerSettings(max_journal_bytes=PART + 2 * SEGMENT, when_unavailable="refuse")
    journal = Journal(tmp_path, 0, settings)
    number = fill(journal)
    assert journal.problem == (f"The journal in {tmp_path} can't grow: ledger.max_journal_bytes is reached.")
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= settings.max_journal_bytes
    assert len(logged(journal)) == number
    min(tmp_path.glob("*.log")).unlink()  # the supervisor has taken it in
    journal._retry = 0.0
    admit(journal).settle("ok", 200, 1)
    journal.close()


async def test_one_write_to_the_disk_serves_all_who_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    monkeypatch.setattr(journal_module, "_to_disk", lambda files: writes.append(len(files)))
    journal = Journal(tmp_path, 0, LedgerSettings(fsync="always"))
    await asyncio.gather(*(journal.synced() for _ in range(50)))
    assert writes == [2] or writes == [2, 2]  # those that came while the first write was on its way
    await journal.synced()
    assert len(writes) <= 3
    journal.close()


@pytest.mark.parametrize("fsync", ["never", "interval"])
async def test_nobody_waits_for_the_disk_unless_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fsync: str
) -> None:
    monkeypatch.setattr(journal_module, "_to_disk", lambda _: pytest.fail("written"))
    journal = Journal(tmp_path, 0, LedgerSettings(fsync=fsync))  # type: ignore[arg-type]
    await journal.synced()
    journal.close()


@pytest.mark.parametrize("policy", ["serve", "refuse"])
async def test_a_disk_that_fails_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    def fail(_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal_module, "_to_disk", fail)
    settings = LedgerSettings(fsync="always", when_unavailable=policy)  # type: ignore[arg-type]
    journal = Journal(tmp_path, 0, settings)
    if policy == "refuse":
        with pytest.raises(LedgerUnavailable):
            await journal.synced()
    else:
        await journal.synced()
    assert journal.problem == f"The journal in {tmp_path} can't be written: input/output error."
    monkeypatch.undo()
    await journal.synced()
    assert journal.problem is None
    journal.close()


async def test_the_second_hand_ends_minutes_and_writes_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = asyncio.Event()
    loop = asyncio.get_running_loop()
    now = 600.0
    monkeypatch.setattr(journal_module.time, "time", lambda: now)
    monkeypatch.setattr(journal_module, "SECOND", 0.01)
    monkeypatch.setattr(journal_module, "_to_disk", lambda _: loop.call_soon_threadsafe(written.set))
    journal = Journal(tmp_path, 0, LedgerSettings(fsync="interval"))
    journal.refused("alice", "over")
    now = 660.0
    task = asyncio.create_task(journal.run())
    await asyncio.wait_for(written.wait(), 30)
    assert len(logged(journal)) == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    journal.close()


def test_closing_writes_down_the_refusals_and_frees_the_lock(tmp_path: Path) -> None:
    journal = Journal(tmp_path, 0, LedgerSettings())
    journal.refused("alice", "over")
    journal.close()
    assert len(logged(journal)) == 1
    with (tmp_path / f"{journal.name}.live").open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_row_is_as_large_as_it_says(journal: Journal, tmp_path: Path) -> None:
    for number in range(3):
        journal.admit(f"req-{number}", 1, "k" * 500, None, "/e", "m" * 400, FREE)
    assert (tmp_path / f"{journal.name}.live").stat().st_size == ROW * ROWS
    assert len(in_flight(journal)) == 3
