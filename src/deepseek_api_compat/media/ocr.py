"""The words in a picture, by RapidOCR on this machine, in a process of its own.

It reads printed Chinese and English (and digits) well, on screenshots, scans, tables and labels of charts; it
does not see what a picture shows, nor lengths of bars, colours or faces, and reads handwriting badly.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from deepseek_api_compat.errors import EngineUnavailable
from deepseek_api_compat.media.images import Picture
from deepseek_api_compat.media.recogniser_process import RecogniserProcess

PROGRAM = "deepseek_api_compat.media.ocr_child"
MEMORY = 3 << 30  # bytes of address space; in use are some 500 MB


@cache
def installed() -> bool:
    """Whether the extra `vision` is."""
    return all(importlib.util.find_spec(name) for name in ("rapidocr", "onnxruntime", "PIL"))


class Recogniser:
    """Reads one picture at a time, in the order in which they come.

    timeout: seconds for one picture; threads: processor cores for it; idle: seconds without work until the
    process ends; memory: bytes of address space that it may take.
    """

    def __init__(
        self, *, timeout: float, threads: int = 2, idle: float = 120.0, memory: int = MEMORY
    ) -> None:
        self._process = RecogniserProcess(
            PROGRAM, "The picture", threads, timeout=timeout, idle=idle, memory=memory
        )

    @property
    def pid(self) -> int | None:
        """Of the process that reads, None while there is none."""
        return self._process.pid

    async def read(self, picture: Picture) -> str:
        """The text in reading order: a line of text for each line in the picture, ` | ` between cells.

        Empty where there is none. Raises InvalidRequest for a picture that can't be decoded,
        EngineUnavailable when reading takes too long or fails, or the extra is missing.
        """
        if not installed():
            raise EngineUnavailable(
                "Pictures can't be read here: the server needs pip install 'deepseek-api-compat[vision]'.",
                code="vision_not_installed",
            )
        head = f"{picture.format} {picture.width} {picture.height}\n".encode()
        return await self._process.ask(head + picture.content)

    async def close(self) -> None:
        """End the process."""
        await self._process.close()
