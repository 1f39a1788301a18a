"""From journals to the ledger: exactly once, whatever dies, breaks or is away."""

import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.errors import LedgerUnavailable, SetupError
from deepseek_api_compat.gateway import journal as journal_module
from deepseek_api_compat.gateway import journal_files
from deepseek_api_compat.gateway.journal import Entry, Journal
from deepseek_api_compat.gateway.ledger import Intake, IntakeState
from deepseek_api_compat.gateway.prices import Price
from deepseek_api_compat.store.ledger import DATABASE, Ledger, open_ledger
from deepseek_api_compat.store.ledger_rows import Batch, Filter, LedgerRow, Refusals, Spent

NOW = 1_780_012_800.0  # midnight, UTC
PRICE = Price(prompt=1_000_000, cached=500_000, completion=2_000_000)


@pytest.fixture
def intake(tmp_path: Path) -> Iterator[Intake]:
    intake = Intake(tmp_path, LedgerSettings(), clock=lambda: NOW)
    intake.directory.mkdir()
    yield intake
    intake.stop()


@pytest.fixture
def journal(intake: Intake) -> Iterator[Journal]:
    journal = Journal(intake.directory, 0, LedgerSettings())
    yield journal
    close(journal)


def close(journal: Journal) -> None:
    if not journal._directory.exists() or journal._table is None:
        return
    journal.close()
    journal._table = None


def admit(journal: Journal, id: str, key_id: str = "alice") -> Entry:
    return journal.admit(id, int(NOW * 1000), key_id, None, "/chat/completions", "deepseek-v3", PRICE)


def rows(intake: Intake) -> dict[str, LedgerRow]:
    return {row.request_id: row for row in intake.ledger().rows(Filter())}


def files(intake: Intake) -> list[str]:
    return sorted(path.suffix for path in intake.directory.iterdir())


def test_a_request_s_whole_story(intake: Intake, journal: Journal) -> None:
    entry = journal.admit("req-1", 5, "alice", "jti-1", "/chat/completions", "deepseek-v3", PRICE)
    entry.dispatched(2, 7)
    entry.first_token(30)
    entry.made(100, 40, 9, 4)
    entry.sent(9)
    price = entry.settle("engine_lost", 502, 250, error_code="engine_failed", finish="stop")
    assert intake.take() == 1
    assert rows(intake) == {
        "req-1": LedgerRow(
            request_id="req-1",
            started=5,
            key_id="alice",
            token_id="jti-1",
            endpoint="/chat/completions",
            model="deepseek-v3",
            replica=2,
            status=502,
            outcome="engine_lost",
            error_code="engine_failed",
            finish="stop",
            queue_ms=7,
            ttft_ms=30,
            total_ms=250,
            prompt_tokens=100,
            cached_tokens=40,
            completion_tokens=9,
            reasoning_tokens=4,
            sent_tokens=9,
            price=price,
        )
    }
    assert price == 60 + 20 + 18


def test_what_never_happened_is_empty(intake: Intake, journal: Journal) -> None:
    admit(journal, "a").settle("cancelled_by_client", 499, 3)
    intake.take()
    row = rows(intake)["a"]
    assert (row.replica, row.queue_ms, row.ttft_ms, row.finish, row.error_code) == (None,) * 5


def test_rounds_go_on_where_the_last_one_ended(intake: Intake, journal: Journal) -> None:
    for number in range(20):
        admit(journal, f"req-{number}").settle("ok", 200, 1)
        if number % 3 == 0:
            intake.take()
    assert intake.take() == 1
    assert intake.take() == 0
    assert len(rows(intake)) == 20


def test_requests_in_flight_wait_while_their_worker_lives(intake: Intake, journal: Journal) -> None:
    entry = admit(journal, "a")
    assert intake.take() == 0
    entry.settle("ok", 200, 1)
    assert intake.take() == 1
    assert rows(intake)["a"].outcome == "ok"


def test_complete_segments_are_deleted(intake: Intake, journal: Journal) -> None:
    number = 0
    while len(list(intake.directory.glob("*.log"))) < 3:
        admit(journal, f"req-{number}", key_id="k" * 800).settle("ok", 200, 1)
        number += 1
    assert intake.take() == number
    assert files(intake) == [".live", ".log", ".log"]  # the one that is written to, and a spare one
    admit(journal, "last").settle("ok", 200, 1)
    intake.take()
    assert len(rows(intake)) == number + 1
    assert intake.ledger().differences() == []


@pytest.mark.parametrize(("sent", "made", "counted"), [(5, 3, 5), (3, 8, 8)])
def test_a_dead_worker_s_requests_are_lost_ones(
    intake: Intake, journal: Journal, sent: int, made: int, counted: int
) -> None:
    entry = admit(journal, "a")
    entry.dispatched(1, 2)
    entry.made(100, 40, made, 2)
    entry.sent(sent)
    admit(journal, "b").settle("ok", 200, 1)
    admit(journal, "c")
    close(journal)  # the lock goes, as with kill -9
    assert intake.take() == 3
    found = rows(intake)
    assert {id: row.outcome for id, row in found.items()} == {
        "a": "gateway_lost",
        "b": "ok",
        "c": "gateway_lost",
    }
    lost = found["a"]
    assert (lost.status, lost.finish, lost.total_ms, lost.replica) == (None, None, None, 1)
    assert (lost.sent_tokens, lost.completion_tokens) == (sent, counted)
    assert lost.price == 60 + 20 + 2 * counted
    assert files(intake) == []


def test_refusals_of_the_living_and_the_dead(intake: Intake, journal: Journal) -> None:
    other = Journal(intake.directory, 1, LedgerSettings())
    for _ in range(3):
        journal.refused("alice", "over")
        other.refused("alice", "over")
    minute = journal._minute
    journal._end_minute(minute + 1)
    other._segments[0].append = lambda _: pytest.fail("killed before it could")  # type: ignore[method-assign]
    with pytest.raises(pytest.fail.Exception):
        other.close()
    other._refusals.clear()
    other.close()
    intake.take()
    assert intake.ledger().refusals(Filter()) == [Refusals(minute, "alice", "over", 6)]


def test_a_record_that_is_in_the_log_and_still_in_the_table_counts_once(
    intake: Intake, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between the two stores that settling is."""
    entry = admit(journal, "a")
    monkeypatch.setattr(journal_files.Row, "clear", lambda _: None)
    entry.settle("ok", 200, 1)
    close(journal)
    intake.take()
    assert [row.outcome for row in rows(intake).values()] == ["ok"]
    assert intake.ledger().differences() == []


def test_a_break_at_any_point_of_the_intake_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call that changes something fails once, before it and after it; the next round goes on."""
    for failing in range(1, 40):
        data_dir = tmp_path / str(failing)
        (data_dir / "journal").mkdir(parents=True)
        journal = Journal(data_dir / "journal", 0, LedgerSettings())
        for number in range(5):
            admit(journal, f"req-{number}").settle("ok", 200, 1)
        admit(journal, "lost")
        journal.refused("alice", "over")
        journal._end_minute(1)
        journal.close()
        calls = 0

        def broken(function: Callable[..., object], failing: int = failing) -> Callable[..., object]:
            def call(*args: object, **keywords: object) -> object:
                nonlocal calls
                calls += 2
                if calls - 1 == failing:
                    raise SetupError("before")
                result = function(*args, **keywords)
                if calls == failing:
                    raise SetupError("after")
                return result

            return call

        intake = Intake(data_dir, LedgerSettings())
        with monkeypatch.context() as patch:
            patch.setattr(Ledger, "take_in", broken(Ledger.take_in))
            patch.setattr(Ledger, "forget", broken(Ledger.forget))
            patch.setattr(Path, "unlink", broken(Path.unlink))
            broke = False
            try:
                intake.take()
            except SetupError:
                broke = True
            intake.stop()
            intake = Intake(data_dir, LedgerSettings())  # another process
            intake.take()
        assert len(rows(intake)) == 6
        assert intake.ledger().differences() == []
        assert [one.count for one in intake.ledger().refusals(Filter())] == [1]
        assert files(intake) == []
        intake.stop()
        if not broke:
            assert failing > 10
            return
    pytest.fail("the intake has no end")


# Killed at any moment, and damage as only a power failure makes it


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("empty")
    open_ledger(directory).close()
    return directory / DATABASE


@contextmanager
def small_files() -> Iterator[None]:
    """Tables of 16 rows and segments of some 100 records, so that a short story fills several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (journal_files, journal_module):
            patch.setattr(module, "PART", 16 * journal_files.ROW)
            patch.setattr(module, "SEGMENT", 16 * 1024)
            patch.setattr(module, "ROOM", 16 * 1024 - 8)
        patch.setattr(journal_module, "SPARE", 4)
        yield


class Story:
    """What happened to a worker, and which bytes say so: (file, start, end)."""

    def __init__(self, data_dir: Path, database: Path) -> None:
        shutil.copy(database, data_dir / DATABASE)
        self.intake = Intake(data_dir, LedgerSettings())
        self.intake.directory.mkdir()
        self.journal = Journal(self.intake.directory, 0, LedgerSettings())
        self.open: dict[str, Entry] = {}
        self.sent: dict[str, int] = {}
        self.settled: dict[str, tuple[str, int, int]] = {}
        self.taken: set[str] = set()
        self.admitted = 0

    def step(self, action: str, number: int) -> None:
        if action == "admit":
            self.admitted += 1
            id = f"req-{self.admitted}"
            self.open[id], self.sent[id] = admit(self.journal, id, "k" * 100 * number), 0
        elif action == "take":
            self.intake.take()
            self.taken = set(self.settled)
        elif self.open:
            id = list(self.open)[number % len(self.open)]
            if action == "sent":
                self.open[id].sent(number)
                self.sent[id] += number
            else:
                self._settle(id)

    def _settle(self, id: str) -> None:
        segment = self.journal._segments[0]
        start = segment.position
        self.open.pop(id).settle("ok", 200, 1)
        if self.journal._segments[0] is not segment:
            segment, start = self.journal._segments[0], 0
        file = f"{self.journal.name}.{self.journal._made - len(self.journal._segments):08d}.log"
        self.settled[id] = (file, start, segment.position)

    def in_flight(self) -> dict[str, tuple[str, int, int]]:
        live = f"{self.journal.name}.live"
        starts = {id: 8 * entry._cell + self._part(entry) for id, entry in self.open.items()}
        return {id: (live, start, start + journal_files.ROW) for id, start in starts.items()}

    def _part(self, entry: Entry) -> int:
        assert self.journal._table is not None
        parts = [cells for _, cells in self.journal._table._maps]
        return parts.index(entry._cells) * journal_files.PART

    def killed(self, into: Path) -> Intake:
        """The files as they are now, which is all that a killed worker leaves."""
        self.intake.stop()
        shutil.copytree(self.intake.directory.parent, into)
        self.journal.close()
        return Intake(into, LedgerSettings())


ACTIONS = st.sampled_from(["admit", "admit", "sent", "settle", "settle", "take"])
STEPS = st.lists(st.tuples(ACTIONS, st.integers(0, 7)), max_size=80)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS, st.sampled_from(["none", "cut", "garbage", "zeros"]), st.data())
def test_killed_or_cut_off_at_any_byte(
    empty_database: Path, steps: list[tuple[str, int]], kind: str, data: st.DataObject
) -> None:
    with small_files(), TemporaryDirectory() as name:
        (Path(name) / "before").mkdir()
        story = Story(Path(name) / "before", empty_database)
        for step in steps:
            story.step(*step)
        places = {**story.settled, **story.in_flight()}
        flying = dict.fromkeys(story.open)
        intake = story.killed(Path(name) / "after")
        hit = _damage(kind, data, intake.directory)
        expected = {id for id, place in places.items() if not hit(*place) or id in story.taken}
        intake.take()
        found = rows(intake)
        assert expected <= set(found) <= set(places)
        assert {id for id, row in found.items() if row.outcome == "gateway_lost"} <= set(flying)
        assert all(found[id].sent_tokens == story.sent[id] for id in expected)
        assert {row.outcome for id, row in found.items() if id in story.settled} <= {"ok"}
        assert intake.ledger().differences() == []
        assert sum(one.requests for one in intake.ledger().summary(Filter(), [])) == len(found)
        assert set(files(intake)) <= {".damaged"}
        intake.stop()


def _damage(kind: str, data: st.DataObject, directory: Path) -> Callable[[str, int, int], bool]:
    """Harm one file; returns whether bytes `start` to `end` of a file are hit."""
    paths = sorted(directory.iterdir()) if kind != "none" else []
    if not paths:
        return lambda file, start, end: False
    path = data.draw(st.sampled_from(paths))
    content = bytearray(path.read_bytes())
    used = len(content.rstrip(b"\0")) + 16
    first = data.draw(st.integers(0, used))
    last = len(content) if kind == "cut" else min(len(content), first + data.draw(st.integers(1, 300)))
    if kind == "cut":
        del content[first:]
    elif kind == "zeros":
        content[first:last] = bytes(last - first)
    else:
        content[first:last] = data.draw(st.randoms(use_true_random=False)).randbytes(last - first)
    path.write_bytes(content)
    return lambda file, start, end: file == path.name and start < last and end > first


# Real deaths

VICTIM = """
import sys, itertools, pathlib
from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.gateway.journal import Journal
from deepseek_api_compat.gateway.prices import FREE
journal = Journal(pathlib.Path(sys.argv[1]), 0, LedgerSettings())
out = open(1, "wb", buffering=0)
for number in itertools.count():
    entry = journal.admit(f"req-{number}", 1, "alice", None, "/chat/completions", "m", FREE)
    out.write(b"a")
    for token in range(3):
        entry.sent(1)
        out.write(b"t")
    if number % 4:  # every fourth stays in flight
        entry.made(1, 0, 3, 0)
        entry.settle("ok", 200, 1)
        out.write(b"s")
"""


def test_kill_9_loses_nothing_and_doubles_nothing(intake: Intake) -> None:
    """What the victim said it had done, it had done; at most one action was not said yet."""
    for _ in range(5):
        victim = subprocess.Popen(
            [sys.executable, "-c", VICTIM, intake.directory], stdout=subprocess.PIPE, bufsize=0
        )
        assert victim.stdout is not None
        said = victim.stdout.read(1)  # it is at work
        wanted = random.randrange(2000)
        while len(said) < wanted:
            said += victim.stdout.read(wanted - len(said))
        victim.send_signal(signal.SIGKILL)
        said += victim.stdout.read()
        victim.stdout.close()
        victim.wait()
        intake.take()
        found = rows(intake)
        sent = sum(row.sent_tokens for row in found.values())
        settled = sum(row.outcome == "ok" for row in found.values())
        assert len(found) - said.count(b"a") in (0, 1)
        assert sent - said.count(b"t") in (0, 1)
        assert settled - said.count(b"s") in (0, 1)
        assert files(intake) == []
        _empty(intake)


def _empty(intake: Intake) -> None:
    assert intake.ledger().prune(NOW, 10**6) > 0


# The database is away


def test_a_locked_database_is_a_problem_until_it_is_free(
    intake: Intake, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_api_compat.store.database.BUSY_TIMEOUT", 0.05)
    intake._round()
    assert intake.state == IntakeState()
    admit(journal, "a").settle("ok", 200, 1)
    other = sqlite3.connect(intake.directory.parent / DATABASE, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    now = NOW + 20
    intake._clock = lambda: now
    intake._round()
    assert "is busy" in str(intake.state.problem)
    assert intake.state.lag_seconds == 20
    assert intake.state.pending > 0
    other.execute("ROLLBACK")
    other.close()
    intake._round()
    assert intake.state == IntakeState()
    assert set(rows(intake)) == {"a"}


def test_a_removed_database_is_made_again(intake: Intake, journal: Journal) -> None:
    admit(journal, "a").settle("ok", 200, 1)
    intake.take()
    for path in intake.directory.parent.glob(DATABASE + "*"):
        path.unlink()
    admit(journal, "b").settle("ok", 200, 1)
    intake.take()
    assert set(rows(intake)) == {"a", "b"}  # "a" was in a file that is still there


def test_a_damaged_database_is_a_problem_and_nothing_leaves_the_journal(
    intake: Intake, journal: Journal
) -> None:
    database = intake.directory.parent / DATABASE
    database.write_bytes(b"no database" * 1000)
    admit(journal, "a").settle("ok", 200, 1)
    close(journal)
    intake._round()
    assert "is damaged" in str(intake.state.problem)
    database.unlink()
    intake._round()
    assert intake.state.problem is None
    assert set(rows(intake)) == {"a"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which takes root")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", tmp_path], check=False)
    if mounted.returncode:
        pytest.skip("no file system may be mounted here")
    try:
        _fill_and_free(tmp_path)
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


def _fill_and_free(disk: Path) -> None:
    intake = Intake(disk, LedgerSettings(), clock=lambda: NOW)
    intake.take()  # the database is made
    journal = Journal(intake.directory, 0, LedgerSettings(when_unavailable="refuse"))
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(65536)):
            pass
    admitted: list[Entry] = []
    number = 0
    with suppress(LedgerUnavailable):
        while True:
            admitted.append(admit(journal, f"req-{number}", key_id="k" * 800))
            number += 1
            if len(admitted) > 500:
                admitted.pop(0).settle("ok", 200, 1)
    for entry in admitted:
        entry.settle("ok", 200, 1)
    intake._round()
    assert "no space left on the disk" in str(intake.state.problem)
    assert "no space left on the disk" in str(journal.problem)
    ballast.unlink()
    intake._round()
    assert intake.state.problem is None
    assert len(rows(intake)) == number > 2000
    assert intake.ledger().differences() == []
    journal.close()
    intake.stop()


def test_a_file_that_can_not_be_read_does_not_hold_up_the_others(intake: Intake, journal: Journal) -> None:
    broken = intake.directory / "w0-000000000000.00000000.log"  # comes first
    broken.mkdir()
    admit(journal, "a").settle("ok", 200, 1)
    intake._round()
    assert "can't be read: is a directory" in str(intake.state.problem)
    assert set(rows(intake)) == {"a"}
    broken.rmdir()
    intake._round()
    assert intake.state.problem is None


# The thread


def test_the_thread_takes_in_and_ends_with_a_last_round(tmp_path: Path) -> None:
    took = threading.Event()

    class Watched(Ledger):
        def take_in(self, batch: Batch) -> int:
            took.set()
            return super().take_in(batch)

    def watched(data_dir: Path, url: str | None) -> Ledger:
        return Watched(open_ledger(data_dir, url)._engine)

    intake = Intake(tmp_path, LedgerSettings(), open=watched, clock=lambda: NOW)
    intake.directory.mkdir()
    journal = Journal(intake.directory, 0, LedgerSettings())
    intake.start()
    admit(journal, "a").settle("ok", 200, 1)
    intake.nudge()
    assert took.wait(10)
    admit(journal, "b").settle("ok", 200, 1)
    journal.close()
    intake.stop()
    store = open_ledger(tmp_path)
    assert [row.request_id for row in store.rows(Filter())] == ["a", "b"]
    store.close()


def test_a_fault_of_ours_does_not_end_the_intake(
    intake: Intake, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "take_in", lambda *_: 1 / 0)
        admit(journal, "a").settle("ok", 200, 1)
        intake._round()
    assert intake.state.problem == "The ledger's intake failed: ZeroDivisionError."
    intake._round()
    assert intake.state.problem is None
    assert set(rows(intake)) == {"a"}


def test_requests_of_a_dead_worker_are_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever counts for limits hears what they had used, also if the table could not be removed then."""
    told: list[tuple[str, int]] = []
    intake = Intake(
        tmp_path,
        LedgerSettings(),
        clock=lambda: NOW,
        on_lost=lambda rows: told.extend((row.request_id, row.completion_tokens) for row in rows),
    )
    intake.directory.mkdir()
    journal = Journal(intake.directory, 0, LedgerSettings())
    admit(journal, "ended").settle("ok", 200, 1)
    admit(journal, "lost").made(10, 0, 7, 0)
    assert intake.take() == 1
    assert told == [], "its worker lives"
    close(journal)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(PermissionError(13, "no")))
        with pytest.raises(OSError, match="no"):
            intake.take()
    intake.take()
    assert told == [("lost", 7)]
    assert set(rows(intake)) == {"ended", "lost"}
    assert {name: one.tokens_today for name, one in intake.spent_by_model().items()} == {"deepseek-v3": 17}
    intake.stop()


def test_what_keys_have_spent_includes_the_journals(intake: Intake, journal: Journal) -> None:
    entry = admit(journal, "a")
    entry.made(100, 40, 9, 4)
    price = entry.settle("ok", 200, 1)
    assert intake.spent() == {"alice": Spent(price, 109)}


def test_old_rows_go_after_their_time(tmp_path: Path) -> None:
    now = NOW
    intake = Intake(tmp_path, LedgerSettings(retention_days=1, usage_retention_days=2), clock=lambda: now)
    intake.directory.mkdir()
    journal = Journal(intake.directory, 0, LedgerSettings())
    admit(journal, "a").settle("ok", 200, 1)
    intake._round()
    assert set(rows(intake)) == {"a"}
    now = NOW + 86400 + 1
    intake._round()
    assert rows(intake) == {}
    assert len(intake.ledger().summary(Filter(), [])) == 1
    now = NOW + 3 * 86400
    intake._round()
    assert intake.ledger().summary(Filter(), []) == []
    journal.close()
    intake.stop()


def test_zero_characters_do_not_stop_the_intake(intake: Intake, journal: Journal) -> None:
    journal.admit("a", 1, "alice", "x\0y", "/e", "m", PRICE).settle("error", 500, 1, finish="\0")
    journal.admit("b", 1, "alice", "x\0y", "/e", "m", PRICE)
    close(journal)
    intake.take()
    assert {(row.token_id, row.finish) for row in rows(intake).values()} == {("xy", ""), ("xy", None)}


def test_a_payload_of_another_version_is_kept_aside(intake: Intake, journal: Journal) -> None:
    admit(journal, "a").settle("ok", 200, 1)
    journal._segments[0].append(journal_module._encode(("other", 1)))
    admit(journal, "b").settle("ok", 200, 1)
    close(journal)
    intake.take()
    assert set(rows(intake)) == {"a", "b"}
    assert intake.state.damaged == 1
    assert files(intake) == [".damaged"]
