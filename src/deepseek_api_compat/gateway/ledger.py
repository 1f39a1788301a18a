"""From the workers' journals into the ledger's database, in a thread of the supervisor.

Twice a second every journal is read from where it was left off. Of a journal whose worker is dead (its lock
is free) also the table of requests in flight is taken in, and its files go. What was read and how far is
stored in one transaction, so that whatever breaks in between, nothing is lost and nothing is taken in twice.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec

from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.errors import SetupError
from deepseek_api_compat.gateway.intake_state import IntakeState
from deepseek_api_compat.gateway.journal import Admission, Refusal, plausible
from deepseek_api_compat.gateway.journal_files import (
    CACHED,
    COMPLETION,
    JOURNALS,
    PROMPT,
    QUEUE,
    REASONING,
    REPLICA,
    SENT,
    TTFT,
    LiveRow,
    Scan,
    read_live,
    scan_log,
)
from deepseek_api_compat.gateway.prices import Price
from deepseek_api_compat.store.datadir import reason
from deepseek_api_compat.store.ledger import Ledger, open_ledger
from deepseek_api_compat.store.ledger_rows import DAY, Batch, LedgerRow, Refusals, Spent

INTERVAL = 0.5  # seconds between two rounds
PIECE = 1024 * 1024  # bytes of a log read at once: a large batch changes each page of an index only once
BATCH = 10_000  # records in one transaction
PRUNED = 5000  # rows that one deletion takes
PRUNE_EVERY = 600.0
MAKING = 60.0  # seconds after which a table that was never finished is litter
logger = logging.getLogger("deepseek_api")

_record = msgspec.msgpack.Decoder(LedgerRow | Refusals)
_live = msgspec.msgpack.Decoder(Admission | Refusal)


class Intake:
    """Owns the ledger's database and all journals of a data directory. Thread-safe.

    Failure policy: whatever goes wrong in a round is said in `state.problem`, logged once, and tried again in
    the next; nothing leaves a journal before it is in the database. Damaged records, which only a power
    failure makes, are skipped and counted, and the file is kept under the name `*.damaged`.
    """

    def __init__(
        self,
        data_dir: Path,
        settings: LedgerSettings,
        open: Callable[[Path, str | None], Ledger] = open_ledger,
        clock: Callable[[], float] = time.time,
        on_lost: Callable[[list[LedgerRow]], None] = lambda rows: None,
    ) -> None:
        """`on_lost`, called in the thread that takes in, is told of each dead worker's requests once: nobody
        has counted for limits and budgets what they had used.
        """
        self.directory = data_dir / JOURNALS
        self._data_dir = data_dir
        self._settings = settings
        self._open = open
        self._clock = clock
        self._on_lost = on_lost
        self._ledger: Ledger | None = None
        self._inode = 0
        self._positions: dict[str, int] = {}
        self._damaged = 0
        self._problem: str | None = None
        self._pending = 0
        self._complete = clock()  # when a round last took in everything
        self._prune_at = 0.0
        self._lock = threading.RLock()
        self._awake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None

    # The thread

    def start(self) -> None:
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    def nudge(self) -> None:
        """Take in now: a worker has died."""
        self._awake.set()

    def stop(self) -> None:
        """A last round, then the end. Blocks as long as the round takes."""
        self._stopping = True
        self._awake.set()
        if self._thread is not None:
            self._thread.join()
        with self._lock:
            if self._ledger is not None:
                self._ledger.close()
                self._ledger = None

    def _run(self) -> None:
        last = False
        while not last:
            last = self._stopping  # read first, so that what stop() finds written is taken in
            self._round()
            if not last:
                self._awake.wait(INTERVAL)
                self._awake.clear()

    def _round(self) -> None:
        try:
            self.take()
            self.prune()
            problem = None
        except SetupError as error:
            problem = str(error)
        except OSError as error:
            problem = f"The journals in {self.directory} can't be read: {reason(error)}."
        except Exception as error:  # a fault of ours must not end the intake for good
            logger.exception("the ledger's intake failed")
            problem = f"The ledger's intake failed: {type(error).__name__}."
        if problem != self._problem:
            logger.warning("ledger: %s", problem or "the problem is over")
        self._problem = problem
        self._pending = self._waiting() if problem else 0

    def _waiting(self) -> int:
        sizes = {path.name: _size(path) for path in self.directory.glob("*.log")}
        return sum(max(0, size - self._positions.get(name, 0)) for name, size in sizes.items())

    # What others ask

    @property
    def state(self) -> IntakeState:
        """Cheap: may be asked in an event loop, for `/ready` and metrics."""
        problem = self._problem
        lag = max(0.0, self._clock() - self._complete) if problem else 0.0
        return IntakeState(lag, self._pending, self._damaged, problem)

    def ledger(self) -> Ledger:
        """The database, opened if it is not. Raises SetupError. Blocks."""
        with self._lock:
            if self._ledger is not None and self._moved(self._ledger):
                self._ledger.close()
                self._ledger = None
            if self._ledger is None:
                self._ledger = self._open(self._data_dir, self._settings.database_url)
                self._inode = _inode(self._ledger.file)
                self._positions.clear()
            return self._ledger

    def spent(self) -> dict[str, Spent]:
        """What each key has used, all journals included. Raises SetupError. Blocks."""
        with self._lock:
            self.take()
            return self.ledger().spent(self._clock())

    def spent_by_model(self) -> dict[str, Spent]:
        """What was used of each model, as far as the ledger knows. Raises SetupError. Blocks."""
        with self._lock:
            return self.ledger().spent_by_model(self._clock())

    def _moved(self, ledger: Ledger) -> bool:
        """Whether somebody has put another file in the database's place: ours would be written to in vain."""
        return _inode(ledger.file) != self._inode

    # Taking in

    def take(self) -> int:
        """One round: take in what there is; returns how many requests. Raises SetupError, OSError. Blocks."""
        with self._lock:
            self.directory.mkdir(mode=0o700, exist_ok=True)
            taken, failed = 0, None
            for name, logs in self._journals():
                try:
                    taken += self._take_journal(name, logs)
                except OSError as error:  # a file that can't be read must not hold up the others
                    failed = error
            if failed is not None:
                raise failed
            self._complete = self._clock()
            return taken

    def _journals(self) -> Iterable[tuple[str, list[Path]]]:
        found: dict[str, list[Path]] = defaultdict(list)
        for path in sorted(self.directory.iterdir()):
            if path.suffix == ".live":
                found[path.stem].extend(())
            elif path.suffix == ".log":
                found[path.name.split(".")[0]].append(path)
            elif path.suffix == ".making" and self._clock() - path.stat().st_mtime > MAKING:
                path.unlink()  # its worker died before it wrote anything
        return found.items()

    def _take_journal(self, name: str, logs: list[Path]) -> int:
        live = self.directory / f"{name}.live"
        with ExitStack() as stack:
            # Before the logs are read: what a dead worker has written is all there is.
            file = _open_if_dead(live, stack)
            dead = file is not None or not live.exists()
            taken = sum(self._take_log(name, path, dead) for path in logs)
            if dead:
                if file is not None:
                    # Made between our look at the directory and its worker's death.
                    logs = sorted(self.directory.glob(f"{name}.*.log"))
                    taken += sum(self._take_log(name, path, dead) for path in logs)
                    taken += self._take_live(name, live, os.pread(file, os.fstat(file).st_size, 0))
                for path in (*logs, live):
                    self._remove(path)
        return taken

    def _take_log(self, name: str, path: Path, dead: bool) -> int:
        """Take in the rest of one segment; a complete one goes when it is in the database."""
        taken, ended = 0, False
        while not ended:
            position = self._position(path.name)
            found = _read_log(path, position, dead)
            if not found.size:
                break
            rows, refusals, odd = _decoded(found.payloads)
            batch = Batch(name, path.name, position, position + found.size, rows, refusals)
            self._positions[path.name] = now_at = self.ledger().take_in(batch)
            if now_at == batch.end:
                taken += len(rows)
                ended = found.ended
                self._note_damage(found.damaged + odd, path)
        if ended:
            self._remove(path)
        return taken

    def _take_live(self, name: str, live: Path, data: bytes) -> int:
        rows, refusals, odd = _in_flight(data)
        known = self.ledger().position(live.name)  # taken in before, by one who could not remove it then
        self.ledger().take_in(Batch(name, live.name, 0, 1, rows, refusals))
        if rows and not known:
            self._on_lost(rows)
        self._note_damage(odd, live)
        return len(rows)

    def _position(self, file: str) -> int:
        ledger = self.ledger()
        if file not in self._positions:
            self._positions[file] = ledger.position(file)
        return self._positions[file]

    def _note_damage(self, places: int, path: Path) -> None:
        if places:
            self._damaged += places
            logger.warning("ledger: %s has %d damaged places; it is kept as %s", path, places, _aside(path))
            if not _aside(path).exists():
                os.link(path, _aside(path))

    def _remove(self, path: Path) -> None:
        path.unlink(missing_ok=True)
        self.ledger().forget(path.name)
        self._positions.pop(path.name, None)

    # Keeping

    def prune(self) -> None:
        """Delete what is older than its retention time, a batch at a time. Raises SetupError. Blocks."""
        with self._lock:
            now, settings = self._clock(), self._settings
            if now < self._prune_at:
                return
            more = False
            if settings.retention_days:
                more = self.ledger().prune(now - settings.retention_days * DAY, PRUNED) == PRUNED
            if settings.usage_retention_days:
                self.ledger().prune_usage(now - settings.usage_retention_days * DAY)
            self._prune_at = now if more else now + PRUNE_EVERY


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _inode(file: Path | None) -> int:
    try:
        return file.stat().st_ino if file is not None else 0
    except OSError:
        return -1


def _open_if_dead(live: Path, stack: ExitStack) -> int | None:
    """A journal's table if its worker is dead, locked until the stack ends; None while it lives."""
    try:
        file = os.open(live, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    stack.callback(os.close, file)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return None
    return file


def _read_log(path: Path, position: int, dead: bool) -> Scan:
    """The next records of a segment."""
    try:
        with open(path, "rb") as file:
            file.seek(position)
            found = scan_log(file.read(PIECE), dead=False, limit=BATCH)
            if not dead or found.size or _only_zeros(file, position):
                return found
            # A dead worker's: records may follow damage.
            file.seek(position)
            return scan_log(file.read(), dead=True, limit=BATCH)
    except FileNotFoundError:
        return scan_log(b"", dead=dead, limit=BATCH)


def _only_zeros(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    return all(piece.count(0) == len(piece) for piece in iter(partial(file.read, PIECE), b""))


def _decoded(payloads: Iterable[bytes]) -> tuple[list[LedgerRow], list[Refusals], int]:
    """Rows, refusals, and how many payloads are neither."""
    rows: list[LedgerRow] = []
    refusals: list[Refusals] = []
    odd = 0
    for payload in payloads:
        try:
            record = _record.decode(payload)
        except msgspec.MsgspecError:
            odd += 1
            continue
        if isinstance(record, LedgerRow):
            rows.append(_clean(record))
        else:
            refusals.append(record)
    return rows, refusals, odd


def _in_flight(data: bytes) -> tuple[list[LedgerRow], list[Refusals], int]:
    """The same for a dead worker's table: its requests are lost ones."""
    rows: list[LedgerRow] = []
    refusals: list[Refusals] = []
    odd = 0
    for row in read_live(data):
        try:
            record = None if row is None else _live.decode(row.payload)
        except msgspec.MsgspecError:
            record = None
        if row is None or record is None:
            odd += 1
        elif isinstance(record, Admission):
            rows.append(_clean(_lost(record, row)))
        else:
            refusals.append(Refusals(record.minute, record.key_id, record.code, row.counters[SENT]))
    return rows, refusals, odd


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".damaged")


def _lost(admission: Admission, row: LiveRow) -> LedgerRow:
    """What is known of a request whose gateway died: what was sent, and what the engine had reported."""
    counters = row.counters
    prompt, cached, completion, reasoning = plausible(
        counters[PROMPT],
        counters[CACHED],
        max(counters[SENT], counters[COMPLETION]),
        counters[REASONING],
    )
    return LedgerRow(
        request_id=admission.request_id,
        started=admission.started,
        key_id=admission.key_id,
        token_id=admission.token_id,
        endpoint=admission.endpoint,
        model=admission.model,
        replica=_or_none(counters[REPLICA]),
        status=None,
        outcome="gateway_lost",
        error_code=None,
        finish=None,
        queue_ms=_or_none(counters[QUEUE]),
        ttft_ms=_or_none(counters[TTFT]),
        total_ms=None,
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        reasoning_tokens=reasoning,
        sent_tokens=counters[SENT],
        price=Price(*admission.prices).of(prompt, cached, completion),
    )


def _or_none(value: int) -> int | None:
    return None if value < 0 else value


def _clean(row: LedgerRow) -> LedgerRow:
    """Without the zero characters that PostgreSQL refuses, and that only a forger would send."""
    if not any("\0" in text for text in (row.token_id, row.model, row.error_code, row.finish) if text):
        return row
    texts = {name: getattr(row, name) for name in ("token_id", "model", "error_code", "finish")}
    return msgspec.structs.replace(
        row, **{name: text.replace("\0", "") for name, text in texts.items() if text}
    )
