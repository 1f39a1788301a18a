"""The process that reads pictures, or listens, for a worker: one question at a time, killed when it hangs.

What strangers send goes through decoders and models written in C++; a crash, or a file that takes all the
memory, must cost one answer and not the gateway. The other side is `recogniser_child`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress

from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.errors import EngineUnavailable, InvalidRequest
from deepseek_api_compat.media.recogniser_child import HEADER, READY, REFUSED, frame

START_TIME = 120.0  # seconds for a process to load its models, on a machine that is busy
LARGEST_ANSWER = 4 << 20  # bytes

# What an interpreter may need to start. A service's environment also has secrets.
_ENVIRONMENT = ("PATH", "HOME", "PYTHON", "LD_", "DYLD_", "LC_", "LANG", "TZ", "TMP")


class RecogniserProcess:
    """Runs `python -m program` and asks it. It starts at the first question and ends after `idle` seconds
    without one; questions wait for each other in order.

    A process that takes longer than `timeout` seconds for an answer, or whose asker is cancelled meanwhile,
    is killed; the next question starts another. It dies with this process.
    what: the thing that it reads, for messages.
    """

    def __init__(
        self, program: str, what: str, *arguments: object, timeout: float, idle: float, memory: int
    ) -> None:
        self._command = [sys.executable, "-m", program]
        self._arguments = [str(memory), *map(str, arguments)]
        self._what = what
        self._timeout = timeout
        self._idle = idle
        self._process: asyncio.subprocess.Process | None = None
        self._killed = False  # by us, though it may take a moment to go
        self._lifeline: Lifeline | None = None
        self._lock = asyncio.Lock()
        self._retirement: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """Of the process, None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def ask(self, question: bytes) -> str:
        """The answer's text.

        Raises InvalidRequest for what the process refuses, EngineUnavailable when it did not start, died or
        took too long.
        """
        async with self._lock:
            self._keep()
            try:
                process = await self._started()
                status, text = await asyncio.wait_for(_exchange(process, question), self._timeout)
            except asyncio.TimeoutError:
                await self._end()
                raise EngineUnavailable(
                    f"{self._what} took longer than {self._timeout:g} s to read.",
                    code="recogniser_timeout",
                    retry_after=1.0,
                ) from None
            except (OSError, asyncio.IncompleteReadError):
                await self._end()
                raise self._unavailable() from None
            except BaseException:
                await self._end()
                raise
            finally:
                self._retire_later()
        if status == REFUSED:
            raise InvalidRequest(text, code="unreadable_media")
        return text

    async def close(self) -> None:
        """End the process. Questions that wait get EngineUnavailable."""
        self._closed = True
        self._kill()
        async with self._lock:
            self._keep()
            await self._end()
            if self._lifeline is not None:
                self._lifeline.close()

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise self._unavailable()
        if self._process is not None and self._process.returncode is None and not self._killed:
            return self._process
        await self._end()  # one that died or was retired
        self._lifeline = self._lifeline or Lifeline()
        fd = self._lifeline.fd
        self._process = process = await asyncio.create_subprocess_exec(
            *self._command,
            str(fd),
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            pass_fds=[fd],
            env={name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
            start_new_session=True,  # Ctrl-C is not for it
            limit=1 << 20,
        )
        self._killed = False
        try:
            status, _ = await asyncio.wait_for(_exchange(process, b""), START_TIME)
        except asyncio.TimeoutError:
            raise asyncio.IncompleteReadError(b"", 1) from None  # it did not start: as good as dead
        if status != READY:
            raise asyncio.IncompleteReadError(b"", 1)
        return process

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        self._kill()
        process.stdin.close()
        while await process.stdout.read(1 << 20):  # else its transport stays open
            pass
        await process.wait()
        self._process = None

    def _kill(self) -> None:
        if self._process is not None:
            self._killed = True
            with suppress(ProcessLookupError):
                self._process.kill()

    def _retire_later(self) -> None:
        if self._process is not None:
            self._retirement = asyncio.get_running_loop().call_later(self._idle, self._kill)

    def _keep(self) -> None:
        if self._retirement is not None:
            self._retirement.cancel()
            self._retirement = None

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(
            f"{self._what} can't be read now: the process that reads it ended.",
            code="recogniser_died",
            retry_after=1.0,
        )


async def _exchange(process: asyncio.subprocess.Process, question: bytes) -> tuple[int, str]:
    """Write a frame (none if empty), read one: its status and text. Raises OSError, IncompleteReadError."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(frame(question))
        await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(HEADER), "big")
    if not 0 < length <= LARGEST_ANSWER:
        raise OSError("an answer that can't be")
    answer = await process.stdout.readexactly(length)
    return answer[0], answer[1:].decode("utf-8", "replace")
