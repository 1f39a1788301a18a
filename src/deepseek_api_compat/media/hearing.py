"""Spoken English as text, by pocketsphinx on this machine, in a process of its own.

A weak recogniser, for want of a better one with weights in its package: one speaker, clear, near, in
American English. It has no punctuation and few names. Of six sentences that espeak-ng said in two voices it
got about four words of ten: "one two three four five" came back, "what time is it now" did not. Whatever
matters needs a transcription endpoint.
"""

from __future__ import annotations

import importlib.util
from functools import cache

from deepseek_api_compat.errors import EngineUnavailable, InvalidRequest
from deepseek_api_compat.media.recogniser_process import RecogniserProcess

PROGRAM = "deepseek_api_compat.media.hearing_child"
MEMORY = 1 << 30  # bytes of address space


@cache
def installed() -> bool:
    """Whether the extra `speech` is."""
    return importlib.util.find_spec("pocketsphinx") is not None


class Hearing:
    """Listens to one recording at a time, in the order in which they come.

    timeout: seconds for one recording; idle: seconds without work until the process ends; memory: bytes of
    address space that it may take; longest: seconds that a recording may last.
    """

    def __init__(
        self, *, timeout: float, idle: float = 120.0, memory: int = MEMORY, longest: float = 120.0
    ) -> None:
        self._process = RecogniserProcess(
            PROGRAM, "The sound", longest, timeout=timeout, idle=idle, memory=memory
        )

    @property
    def pid(self) -> int | None:
        """Of the process that listens, None while there is none."""
        return self._process.pid

    async def listen(self, content: bytes, format: str) -> str:
        """What is said, in small letters; empty where nothing is.

        Raises InvalidRequest for another format than "wav", a file that can't be read and one that lasts too
        long, EngineUnavailable when listening takes too long or fails, or the extra is missing.
        """
        if not installed():
            raise EngineUnavailable(
                "Sound can't be heard here: the server needs pip install 'deepseek-api-compat[speech]'.",
                code="speech_not_installed",
            )
        if format.lower() != "wav":
            raise InvalidRequest(
                f"Sound as {format!r} can't be heard here, only 'wav'; for others the server needs a "
                "transcription endpoint.",
                code="unsupported_audio_format",
            )
        return await self._process.ask(content)

    async def close(self) -> None:
        """End the process."""
        await self._process.close()
