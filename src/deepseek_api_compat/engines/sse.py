"""Server-sent events out of bytes cut anywhere. No I/O."""

from __future__ import annotations


class SseReader:
    """For servers that send one `data:` line an event, as vLLM and SGLang do; comments are skipped."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The data of each event that is complete now."""
        lines = (self._rest + data).split(b"\n")
        self._rest = lines.pop()
        return [line[5:].strip() for line in lines if line.startswith(b"data:")]
