"""What a worker writes down about its requests, at once and without a system call.

    entry = journal.admit(...)      before an engine hears of the request
    await journal.synced()          waits only if ledger.fsync is "always"
    entry.dispatched(replica, queue_ms); entry.first_token(ttft_ms)
    entry.made(prompt, cached, completion, reasoning)   what the engine has counted so far
    entry.sent(tokens)              right before each write to the client
    price = entry.settle("ok", 200, total_ms, finish="stop")

`gateway/ledger.py` takes it into the database. The files are described in `gateway/journal_files.py`.
"""

from __future__ import annotations

import asyncio
import os
import time
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from deepseek_api_compat.config import LedgerSettings
from deepseek_api_compat.errors import LedgerUnavailable
from deepseek_api_compat.gateway.journal_files import (
    CACHED,
    CELLS,
    COMPLETION,
    MAX_RECORD,
    PART,
    PAYLOAD,
    PROMPT,
    QUEUE,
    REASONING,
    REPLICA,
    ROOM,
    SEGMENT,
    SENT,
    TTFT,
    LiveTable,
    Row,
    Segment,
)
from deepseek_api_compat.gateway.prices import Price
from deepseek_api_compat.store.datadir import reason
from deepseek_api_compat.store.ledger_rows import Outcome

SPARE = 512  # records that must fit besides those that are promised, or the log grows
SECOND = 1.0  # between two tries to make a file, and two writes to the disk
MOST = 10**9  # tokens of one request
LONGEST = 40  # characters of a text that is too long to be kept whole

_Admission = tuple[str, int, str, "str | None", str, str]  # the fields of Admission but its prices
_encode = msgspec.msgpack.Encoder().encode
_nowhere = memoryview(array("q", bytes(8 * CELLS)))


class Admission(msgspec.Struct, frozen=True, array_like=True, tag="admitted"):
    """What a live row says of its request; `prices` are the fields of `Price`."""

    request_id: str
    started: int
    key_id: str
    token_id: str | None
    endpoint: str
    model: str
    prices: tuple[int, int, int]


class Refusal(msgspec.Struct, frozen=True, array_like=True, tag="refusal"):
    """What a live row says of refusals; their count is in the cell SENT."""

    minute: int
    key_id: str
    code: str


class Entry:
    """One admitted request, until it is settled. Every method is a few stores into memory.

    Nothing is written down for a request that was admitted without a record; it has its price all the same.
    """

    __slots__ = ("_admission", "_cell", "_cells", "_journal", "_price", "_row")

    def __init__(self, journal: Journal, row: Row | None, admission: _Admission, price: Price) -> None:
        self._journal = journal
        self._row = row
        self._admission = admission
        self._price = price
        if row is None:
            self._cells, self._cell = memoryview(array("q", bytes(8 * CELLS))), 0
        else:
            self._cells, self._cell = row.cells, row.cell

    def dispatched(self, replica: int, queue_ms: int) -> None:
        self._cells[self._cell + REPLICA] = replica
        self._cells[self._cell + QUEUE] = queue_ms

    def first_token(self, ttft_ms: int) -> None:
        self._cells[self._cell + TTFT] = ttft_ms

    def sent(self, tokens: int) -> None:
        """So many more tokens are about to be written to the client's connection."""
        self._cells[self._cell + SENT] += tokens

    def made(self, prompt: int, cached: int, completion: int, reasoning: int) -> None:
        """What counts so far: all tokens since the request began, over all its choices."""
        cells, cell = self._cells, self._cell
        try:
            cells[cell + PROMPT] = prompt
            cells[cell + CACHED] = cached
            cells[cell + COMPLETION] = completion
            cells[cell + REASONING] = reasoning
        except ValueError:  # no 64-bit number: an upstream may say anything
            self.made(*plausible(prompt, cached, completion, reasoning))

    def settle(
        self,
        outcome: Outcome,
        status: int,
        total_ms: int,
        *,
        error_code: str | None = None,
        finish: str | None = None,
    ) -> int:
        """Record the end, with the counts that `made` was told last. Call it once; returns the price."""
        cells, cell = self._cells, self._cell
        self._cells, self._cell = _nowhere, 0  # a late call must not count for the row's next request
        prompt, cached = cells[cell + PROMPT], cells[cell + CACHED]
        completion, reasoning = cells[cell + COMPLETION], cells[cell + REASONING]
        if not (0 <= cached <= prompt <= MOST and 0 <= reasoning <= completion <= MOST):
            prompt, cached, completion, reasoning = plausible(prompt, cached, completion, reasoning)
        price = self._price.of(prompt, cached, completion)
        if self._row is not None:
            replica, queue, ttft = cells[cell + REPLICA], cells[cell + QUEUE], cells[cell + TTFT]
            record = (  # in the order of LedgerRow
                "row",
                *self._admission,
                None if replica < 0 else replica,
                status,
                outcome,
                error_code,
                finish,
                None if queue < 0 else queue,
                None if ttft < 0 else ttft,
                total_ms,
                prompt,
                cached,
                completion,
                reasoning,
                cells[cell + SENT],
                price,
            )
            self._journal._settled(self._row, record)
            self._row = None
        return price


class Journal:
    """The journal of one worker process; for its event loop only.

    Failure policy: making a file may fail, because the disk is full or the journals have reached
    `max_journal_bytes`; it is tried again each second. Room for a request's record is set aside when it is
    admitted, so whoever has a record keeps it. Without room `when_unavailable` decides: "refuse" raises
    LedgerUnavailable, "serve" admits without a record and counts it in `unrecorded`. `problem` is a sentence
    while files can't be made or can't be written to the disk; None is how it must be.
    """

    def __init__(self, directory: Path, worker: int, settings: LedgerSettings) -> None:
        """`directory` must exist."""
        self.name = f"w{worker}-{os.urandom(6).hex()}"
        self.unrecorded = 0
        self._no_room: str | None = None
        self._no_disk: str | None = None
        self._directory = directory
        self._settings = settings
        self.waits = settings.fsync == "always"  # must a request wait for `synced`?
        self._table: LiveTable | None = None
        self._free: list[Row] = []
        self._segments: list[Segment] = []  # the first one is written to
        self._ended: list[Segment] = []  # not yet written to the disk
        self._made = 0
        self._promised = 0  # records that room is set aside for
        self._retry = 0.0
        self._minute = 0
        self._refusals: dict[tuple[str, str], Row] = {}
        self._stored = self._durable = 0
        self._syncing = asyncio.Lock()
        self._make_room()

    @property
    def problem(self) -> str | None:
        return self._no_room or self._no_disk

    @property
    def refuses(self) -> bool:
        return self.problem is not None and self._settings.when_unavailable == "refuse"

    def admit(
        self,
        request_id: str,
        started: int,
        key_id: str,
        token_id: str | None,
        endpoint: str,
        model: str,
        price: Price,
    ) -> Entry:
        """Write down that a request begins; `started` in unix milliseconds. Raises LedgerUnavailable.

        `request_id` must be unique for ever, so never the client's own.
        """
        admission = (request_id, started, key_id, token_id, endpoint, model)
        row = self._take_row()
        if row is None:
            if self._settings.when_unavailable == "refuse":
                raise _unavailable()
            self.unrecorded += 1
            return Entry(self, None, admission, price)
        row.fill(_encoded(("admitted", *admission, price), PAYLOAD))
        return Entry(self, row, admission, price)

    def refused(self, key_id: str, code: str) -> None:
        """Count a refusal of a known key. A minute's counts go to the log when it is over."""
        minute = int(time.time()) // 60
        if minute != self._minute:
            self._end_minute(minute)
        row = self._refusals.get((key_id, code))
        if row is None:
            row = self._take_row()
            if row is None:
                self.unrecorded += 1
                return
            row.fill(_encoded(("refusal", minute, key_id, code), PAYLOAD))
            self._refusals[key_id, code] = row
        row.cells[row.cell + SENT] += 1

    def _end_minute(self, minute: int) -> None:
        for (key_id, code), row in self._refusals.items():
            self._settled(row, ("refused", self._minute, key_id, code, row.cells[row.cell + SENT]))
        self._refusals.clear()
        self._minute = minute

    # Room

    def _take_row(self) -> Row | None:
        """A free row, and room in the log for what it will become; None if there is none."""
        position = self._segments[0].position if self._segments else SEGMENT
        needed = (self._promised + SPARE) * MAX_RECORD
        if (position + needed > ROOM or not self._free) and not self._enough():
            return None
        self._promised += 1
        return self._free.pop()

    def _enough(self) -> bool:
        """Whether there is room for one more, after an attempt to make some."""
        if self._room() < self._promised + SPARE or not self._free:
            now = time.monotonic()
            if now >= self._retry:
                self._retry = now + SECOND if not self._make_room() else 0.0
        return self._room() > self._promised and bool(self._free)

    def _room(self) -> int:
        return sum(segment.room for segment in self._segments)

    def _make_room(self) -> bool:
        """Grow the table and the log as far as needed. False, and `problem` says why, if that failed."""
        try:
            while self._room() < self._promised + SPARE:
                self._check_size(SEGMENT)
                path = self._directory / f"{self.name}.{self._made:08d}.log"
                # The table first: a log without a table is a dead worker's.
                self._table = self._table or self._new_table()
                self._segments.append(Segment(path))
                self._made += 1
            if not self._free and self._table is not None:
                self._check_size(PART)
                self._free = self._table.grow()
        except OSError as error:
            self._no_room = f"The journal in {self._directory} can't grow: {reason(error)}."
            return False
        self._no_room = None
        return True

    def _new_table(self) -> LiveTable:
        table = LiveTable(self._directory, self.name)
        self._free = table.rows
        return table

    def _check_size(self, more: int) -> None:
        size = 0
        for path in self._directory.iterdir():
            with suppress(FileNotFoundError):  # the supervisor may have just taken it in
                size += path.stat().st_size if path.suffix in (".log", ".live") else 0
        if size + more > self._settings.max_journal_bytes:
            raise OSError("ledger.max_journal_bytes is reached")

    # The log

    def _settled(self, row: Row, record: tuple[object, ...]) -> None:
        """Append a record, and only then free its row."""
        payload = _encoded(record, MAX_RECORD - 8)
        while not self._segments[0].append(payload):
            self._end_segment()
        row.clear()
        self._free.append(row)
        self._promised -= 1

    def _end_segment(self) -> None:
        ended = self._segments.pop(0)
        ended.end()
        if self._settings.fsync == "never":
            ended.close()
        else:
            self._ended.append(ended)

    # The disk

    async def run(self) -> None:
        """Once a second: end the minute of refusals, make room, write to the disk. Until it is cancelled."""
        while True:
            await asyncio.sleep(SECOND)
            minute = int(time.time()) // 60
            if minute != self._minute and self._refusals:
                self._end_minute(minute)
            if self._no_room is not None:  # whoever believes /ready sends no request that would try it
                self._make_room()
            if self._settings.fsync != "never":
                with suppress(OSError):  # `problem` says so
                    await self._sync()

    async def synced(self) -> None:
        """With ledger.fsync "always": wait until all that was stored before this call is on the disk.

        One write to the disk serves all who wait. Raises LedgerUnavailable if it fails.
        """
        if not self.waits:
            return
        try:
            await self._sync()
        except OSError:
            if self._settings.when_unavailable == "refuse":
                raise _unavailable() from None

    async def _sync(self) -> None:
        self._stored += 1
        wanted = self._stored
        async with self._syncing:
            if self._durable >= wanted:
                return
            covers = self._stored
            ended = self._ended[:]
            files = [one.fd for one in (*ended, *self._segments[:1])]
            if self._table is not None:
                files.append(self._table.fd)
            try:
                await asyncio.to_thread(_to_disk, files)
            except OSError as error:
                self._no_disk = f"The journal in {self._directory} can't be written: {reason(error)}."
                raise
            self._no_disk = None
            self._durable = covers
            for segment in ended:
                self._ended.remove(segment)
                segment.close()

    def close(self) -> None:
        """Every entry is settled by now; what is not becomes a lost request. Not while `run` is running."""
        self._end_minute(0)
        for segment in (*self._ended, *self._segments):
            segment.close()
        if self._table is not None:
            self._table.close()


def plausible(prompt: int, cached: int, completion: int, reasoning: int) -> tuple[int, int, int, int]:
    """The counts, made to be such that their price and their sums can be counted."""
    prompt, completion = max(0, min(prompt, MOST)), max(0, min(completion, MOST))
    return prompt, max(0, min(cached, prompt)), completion, max(0, min(reasoning, completion))


def _unavailable() -> LedgerUnavailable:
    return LedgerUnavailable("Requests can't be written down now. Please retry later.", retry_after=5.0)


def _to_disk(files: Sequence[int]) -> None:
    for file in files:
        os.fsync(file)


def _encoded(record: tuple[object, ...], most: int) -> bytes:
    try:
        payload = _encode(record)
        if len(payload) <= most:
            return payload
    except UnicodeEncodeError:
        pass
    # Texts too long, or with lone surrogates, as a token's id may have: never worth losing a record.
    return _encode(tuple(_plain(value) if isinstance(value, str) else value for value in record))


def _plain(text: str) -> str:
    return text[:LONGEST].encode("utf-8", "replace").decode()
