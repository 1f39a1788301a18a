"""Progress of long steps, told to a person on standard error."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

_WIDTH = 24
_REDRAW = 0.1


class Progress:
    """Where sentences and bars go: `stream`, standard error by default."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def bar(self, label: str, total: int) -> Bar:
        """A bar for `total` bytes; use it in a `with` block so that its line is always ended."""
        return Bar(self._stream, label, total)


class Bar:
    """On a terminal one line that is redrawn, with the speed; elsewhere a line for every tenth."""

    def __init__(self, stream: TextIO, label: str, total: int) -> None:
        self._stream, self._label, self._total = stream, label, max(total, 1)
        self._tty = stream.isatty()
        self._done = self._from = 0
        self._started = self._drawn = time.monotonic()
        self._tenths = -1

    def __enter__(self) -> Bar:
        self._draw() if self._tty else self._print_tenth()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tty:
            self._draw()
            print(file=self._stream, flush=True)

    def start_at(self, done: int) -> None:
        """`done` bytes were already there; they don't count for the speed."""
        self._done = self._from = done

    def reach(self, done: int) -> None:
        """`done` bytes of the total are there now."""
        self._done = done
        if not self._tty:
            self._print_tenth()
        elif time.monotonic() - self._drawn >= _REDRAW:
            self._draw()

    def add(self, more: int) -> None:
        self.reach(self._done + more)

    def say(self, text: str) -> None:
        """A sentence between two states of the bar."""
        print(f"\r\x1b[K{text}" if self._tty else text, file=self._stream, flush=True)

    def _fraction(self) -> float:
        return min(self._done / self._total, 1.0)

    def _print_tenth(self) -> None:
        tenths = int(self._fraction() * 10)
        if tenths > self._tenths:
            self._tenths = tenths
            sizes = f"{size(self._done)} of {size(self._total)}"
            print(f"{self._label}: {tenths * 10}% ({sizes})", file=self._stream, flush=True)

    def _draw(self) -> None:
        self._drawn = time.monotonic()
        speed = (self._done - self._from) / max(self._drawn - self._started, 1e-3)
        filled = int(self._fraction() * _WIDTH)
        bar = "#" * filled + "-" * (_WIDTH - filled)
        text = f"{self._label} [{bar}] {self._fraction():4.0%} of {size(self._total)}, {size(speed)}/s"
        self._stream.write(f"\r{text}\x1b[K")
        self._stream.flush()


def size(count: float) -> str:
    """Bytes for people, in powers of a thousand: `92.9 MB`, `689 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
