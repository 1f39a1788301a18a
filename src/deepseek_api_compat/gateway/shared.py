"""Memory that all processes of one service share, and the lock on it.

The supervisor makes one file without a name, in memory where the system can, maps it and hands the
descriptor to its workers. The lock is a POSIX record lock on that file: the kernel releases it when its
holder dies, so a killed worker can never leave it held. Critical sections are a few microseconds of
arithmetic; nothing awaits inside.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import tempfile
from types import TracebackType


class SharedMemory:
    """`cells` 64-bit cells, seen as integers (`ints`) or as floats (`floats`); zero at the start.

    Use as a context manager to hold the lock. Not re-entrant, not for threads.
    """

    def __init__(self, fd: int, cells: int) -> None:
        self.fd = fd
        self.cells = cells
        self._map = mmap.mmap(fd, cells * 8)
        self.ints = memoryview(self._map).cast("q")
        self.floats = memoryview(self._map).cast("d")

    @classmethod
    def create(cls, cells: int) -> SharedMemory:
        fd = _nameless_file()
        os.ftruncate(fd, cells * 8)  # sparse: a page exists from the first write to it
        return cls(fd, cells)

    def __enter__(self) -> SharedMemory:
        fcntl.lockf(self.fd, fcntl.LOCK_EX, 1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.lockf(self.fd, fcntl.LOCK_UN, 1)

    def close(self) -> None:
        self.ints.release()
        self.floats.release()
        self._map.close()
        os.close(self.fd)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):  # Linux: no disk can be full under it, and nothing is written back
        return os.memfd_create("deepseek-api")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
