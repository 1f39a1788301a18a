"""Server-sent events out of bytes cut anywhere. No I/O."""

from __future__ import annotations

from deepseek_api_compat.errors import EngineFailed

MAX_EVENT = 16 * 1024 * 1024


class SseReader:
    """For servers that send one `data:` line an event, as vLLM and SGLang do; comments are skipped.

    Raises EngineFailed for an event that goes on for too long: what has no end would fill the memory.
    """

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete now."""
        lines = (self._rest + data).split(b"\n")
        self._rest = unfinished(lines.pop())
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]


def unfinished(data: bytes) -> bytes:
    """The beginning of an event whose end has not come. Raises EngineFailed if it is too long."""
    if len(data) > MAX_EVENT:
        raise EngineFailed("The engine sent an event of over 16 MiB.")
    return data
