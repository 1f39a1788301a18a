"""The files of `prometheus_client` in which the workers count, such that a full disk does no harm.

The library leaves holes in its files: on a full disk a store into one would kill the process. Here all space
is taken when a file is made or grows. Where there is none, what does not fit is counted in this process
only, where nobody reads it. A worker goes on with the file of a dead one, so that its start takes no space.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from struct import calcsize
from typing import Any

from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from deepseek_api_compat.gateway.journal_files import reserve

SIZE = 1 << 16  # bytes of a new file; a size that the library would double, too
_AROUND = calcsize("=idd") + 8  # bytes that a number takes besides its name, at most


class MetricFile(MmapedDict):
    """One kind of metrics of one worker, as long as that lives. Never raises for want of space."""

    def __init__(self, filename: str, read_mode: bool = False) -> None:
        """`filename` is what the library would call it; its name ends in `_PID.db`."""
        found = _mine(Path(filename))
        if found is None:
            self._f: Any = None
            self._use(mmap.mmap(-1, SIZE))
        else:
            self._f = found
            self._use(mmap.mmap(found.fileno(), os.fstat(found.fileno()).st_size))
        self._positions: dict[str, int] = {}
        self._used = int.from_bytes(self._m[:4], "little") or 8
        self._m[:4] = self._used.to_bytes(4, "little")
        for key, _, _, position in self._read_all_values():  # type: ignore[no-untyped-call]
            self._positions[key] = position

    def _init_value(self, key: str) -> None:
        while self._used + len(key.encode()) + _AROUND > self._capacity:
            self._grow()
        super()._init_value(key)  # type: ignore[no-untyped-call]

    def _use(self, map: mmap.mmap) -> None:
        self._m: Any = map
        self._capacity = len(map)

    def _grow(self) -> None:
        before, size = self._m, 2 * self._capacity
        if self._f is not None:
            with suppress(OSError):
                reserve(self._f.fileno(), self._capacity, self._capacity)
                self._use(mmap.mmap(self._f.fileno(), size))
                return
        self._use(mmap.mmap(-1, size))
        self._m[: len(before)] = before[:]


def _mine(wanted: Path) -> Any:
    """A dead worker's file or a new one, locked as long as this process lives; None: there is no space."""
    kind = wanted.name.rsplit("_", 1)[0]
    with ExitStack() as stack:
        directory = os.open(wanted.parent, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, directory)
        fcntl.flock(directory, fcntl.LOCK_EX)  # one worker at a time looks for its file
        for path in sorted(wanted.parent.glob(f"{kind}_*.db")):
            file = path.open("r+b", buffering=0)
            with suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            file.close()
        with suppress(OSError):
            return _new(wanted)
        return None


def _new(path: Path) -> Any:
    """A file that has its space and its lock before it has its name: by that others read it at any moment."""
    unnamed = path.with_suffix(".new")
    file = unnamed.open("w+b", buffering=0)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        reserve(file.fileno(), 0, SIZE)
        unnamed.rename(path)
    except OSError:
        file.close()
        unnamed.unlink()
        raise
    return file


def use() -> None:
    """From now on the library counts in such files. Before the first metric is made."""
    values.MmapedDict = MetricFile  # type: ignore[attr-defined]
