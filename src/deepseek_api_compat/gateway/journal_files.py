"""The files of a journal: how they are laid out, written and read.

A journal is what one worker process writes down, in two kinds of files that are mapped into memory. A store
into such a mapping belongs to the kernel at once: no system call, and nothing is lost when the process dies.

`NAME.live`, a table of rows of `ROW` bytes, locked (flock) by its worker as long as it lives:

    commit | sent | prompt | cached | completion | reasoning | replica | queue ms | ttft ms | payload
    64-bit cells; commit = CRC32 of the payload << 16 | its size, stored last, 0 while the row is free

`NAME.NUMBER.log`, `SEGMENT` bytes of records, each at a multiple of 8:

    header | payload                  header = CRC32 << 32 | size << 16 | MAGIC, stored last

A header without a size ends the segment: the next number goes on. Payloads are MessagePack.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

COMMIT, SENT, PROMPT, CACHED, COMPLETION, REASONING, REPLICA, QUEUE, TTFT, CELLS = range(10)
ROW = 1024
PAYLOAD = ROW - 8 * CELLS  # bytes for a row's payload
ROWS = 1024  # the table grows by so many
PART = ROW * ROWS
SEGMENT = 4 * 1024 * 1024
MAX_RECORD = 1664  # bytes, with its header
MAGIC = 0x4A4C
ROOM = SEGMENT - 8  # of records; the header that ends a segment follows

_row = struct.Struct(f"={CELLS}q")
_FRESH = struct.pack(f"={CELLS - 1}q", 0, 0, 0, 0, 0, -1, -1, -1)
crc32 = zlib.crc32
JOURNALS = "journal"  # their folder in the data directory


class Row:
    """A place in the table. `cells[cell + SENT]` and so on are its counters."""

    __slots__ = ("_map", "_start", "cell", "cells")

    def __init__(self, map: mmap.mmap, cells: memoryview[int], start: int) -> None:
        self._map = map
        self._start = start
        self.cells = cells
        self.cell = start >> 3

    def fill(self, payload: bytes) -> None:
        """Begin to use it, with fresh counters. `payload`: 1 to PAYLOAD bytes."""
        start, size = self._start, len(payload)
        self._map[start + 8 : start + 8 * CELLS + size] = _FRESH + payload
        self.cells[self.cell] = crc32(payload) << 16 | size

    def clear(self) -> None:
        self.cells[self.cell] = 0


class LiveTable:
    """The table of one process. Raises OSError where its file can't be made; a full disk is found at once."""

    def __init__(self, directory: Path, name: str) -> None:
        self._path = directory / f"{name}.live"
        # Locked before it gets its name, or it would look like a dead worker's for a moment.
        making = directory / f".{name}.making"
        self.fd = os.open(making, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._maps: list[tuple[mmap.mmap, memoryview[int]]] = []
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX)
            self.rows = self.grow()
            making.rename(self._path)
        except BaseException:
            making.unlink(missing_ok=True)
            self.close()
            raise

    def grow(self) -> list[Row]:
        """Rows that were not there before."""
        start = len(self._maps) * PART
        reserve(self.fd, start, PART)
        map = mmap.mmap(self.fd, PART, offset=start)
        cells = memoryview(map).cast("q")
        self._maps.append((map, cells))
        return [Row(map, cells, at) for at in reversed(range(0, PART, ROW))]

    def close(self) -> None:
        for map, cells in self._maps:
            cells.release()
            map.close()
        os.close(self.fd)


class Segment:
    """One file of the log, all of its space taken at the start. Raises OSError where it can't be made."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self.position = 0
        try:
            reserve(self.fd, 0, SEGMENT)
        except OSError:
            os.close(self.fd)
            path.unlink()
            raise
        self._map = mmap.mmap(self.fd, SEGMENT)
        self._cells = memoryview(self._map).cast("Q")

    @property
    def room(self) -> int:
        """How many records are sure to fit."""
        return (ROOM - self.position) // MAX_RECORD

    def append(self, payload: bytes) -> bool:
        """False if it does not fit any more."""
        start, size = self.position, len(payload)
        end = start + 8 + (size + 7 & ~7)
        if end > ROOM:
            return False
        self._map[start + 8 : start + 8 + size] = payload
        self._cells[start >> 3] = crc32(payload) << 32 | size << 16 | MAGIC
        self.position = end
        return True

    def end(self) -> None:
        self._cells[self.position >> 3] = MAGIC

    def close(self) -> None:
        self._cells.release()
        self._map.close()
        os.close(self.fd)


def reserve(fd: int, start: int, size: int) -> None:
    """Take the space on the disk now: a store into a mapping that finds none would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, start, size)
    else:  # macOS
        os.pwrite(fd, bytes(size), start)


class Scan(NamedTuple):
    """What a part of a log holds: payloads, how many bytes they took, whether the segment ended, and how
    many damaged places were skipped."""

    payloads: list[bytes]
    size: int
    ended: bool
    damaged: int


def scan_log(data: bytes, *, dead: bool, limit: int) -> Scan:
    """Up to `limit` payloads from the beginning of `data`, which is at a record's place.

    `dead`: its writer is gone, so that what is not a record is damage, and records may come after it. Else
    it is a record that is being written.
    """
    data = data[: len(data) & ~7]
    headers = memoryview(data).cast("Q")
    payloads: list[bytes] = []
    at = damaged = 0
    while at < len(data) and len(payloads) < limit:
        header = headers[at >> 3]
        if header == MAGIC:
            return Scan(payloads, at + 8, True, damaged)
        payload = _record(data, at, header)
        if payload is not None:
            payloads.append(payload)
            at += 8 + (len(payload) + 7 & ~7)
        elif not dead or not data[at:].lstrip(b"\0"):
            break
        else:
            places = range(at + 8, len(data), 8)
            later = next((n for n in places if _record(data, n, headers[n >> 3]) is not None), None)
            if not header and later is None:
                break  # killed while it stored a payload: what that was about is still in the table
            damaged += 1
            at = later or len(data)
    return Scan(payloads, at, False, damaged)


def _record(data: bytes, at: int, header: int) -> bytes | None:
    size = header >> 16 & 0xFFFF
    if header & 0xFFFF != MAGIC or not 0 < size <= MAX_RECORD - 8 or at + 8 + size > len(data):
        return None
    payload = data[at + 8 : at + 8 + size]
    return payload if crc32(payload) == header >> 32 else None


class LiveRow(NamedTuple):
    """A row that was in use: its counters by their numbers (`counters[SENT]`), and its payload."""

    counters: tuple[int, ...]
    payload: bytes


def read_live(data: bytes) -> Iterator[LiveRow | None]:
    """The rows in use of a table; None for one that is damaged."""
    for start in range(0, len(data) - ROW + 1, ROW):
        counters = _row.unpack_from(data, start)
        commit = counters[COMMIT]
        if commit:
            size = commit & 0xFFFF
            payload = data[start + 8 * CELLS : start + 8 * CELLS + size]
            intact = 0 < size <= PAYLOAD and crc32(payload) == commit >> 16
            yield LiveRow(counters, payload) if intact else None
