"""Prompts of models that bring their own chat template, rendered in a process apart (`template_process`).

A worker has one such process. It is started when first needed and again after it died; when a render
takes longer than it may, it is killed.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.engines.base import ModelInfo
from deepseek_api_compat.errors import InternalError, InvalidRequest
from deepseek_api_compat.protocol import template_frames as frames
from deepseek_api_compat.protocol.openai import ChatRequest
from deepseek_api_compat.protocol.segment import Prompt
from deepseek_api_compat.protocol.template import ModelTemplate, plain_prompt

START_TIME = 20.0  # seconds for the process to start, on a busy machine
RENDER_TIME = 2.0  # seconds for one render
BYTES_PER_SECOND = 8 << 20  # of a question; so much longer may a large one take
LARGEST_ANSWER = 64 << 20  # bytes; beyond that, four times the question
STRIKES = 3  # times in a row that a template may break the process
REFUSED_FOR = 60.0  # seconds, after that
LARGE = 1 << 18  # characters of a request that is prepared in a thread
MANY = 500  # messages, likewise
REMEMBERED = 64  # models
LONGEST_SOURCE = 1 << 18  # characters; real templates have some ten thousand

# What an interpreter may need to start, and the local time. A service's environment also has secrets.
_ENVIRONMENT = ("PATH", "HOME", "PYTHON", "LD_", "DYLD_", "LC_", "LANG", "TZ")

T = TypeVar("T")


class Broke(Exception):
    """A template took too long, or too much memory, or the process died of it; `str()` says which."""


class _Died(Exception):
    """The process is gone, nobody knows why."""


class RenderProcess:
    """The process that renders, one question at a time. `ask` may be cancelled at any time.

    A death without a cause (somebody killed the process) goes unnoticed: the question is asked once more.
    """

    def __init__(self, render_time: float = RENDER_TIME) -> None:
        self._render_time = render_time
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._numbers: dict[str, int] = {}  # of templates
        self._sent: set[int] = set()  # templates that the process has
        self._closed = False

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def warm(self) -> None:
        """Have the process running. Raises Broke if it can't be started."""
        async with self._lock:
            try:
                await self._started()
            except _Died:
                raise Broke("can't be rendered: its process doesn't start") from None

    async def ask(self, source: str, variables: bytes) -> tuple[bytes, str]:
        """Status and text (see `template_process`) of a template with `variables`, JSON. Raises Broke."""
        await self._lock.acquire()
        # When the caller is cancelled, the answer must still be read before the next question is asked.
        asking = asyncio.create_task(self._ask(source, variables))
        asking.add_done_callback(lambda _: self._lock.release())
        return await asyncio.shield(asking)

    async def _ask(self, source: str, variables: bytes) -> tuple[bytes, str]:
        for _ in range(2):
            with suppress(_Died):
                return await self._try(source, variables)
        raise Broke("ends the process that renders it")

    async def _try(self, source: str, variables: bytes) -> tuple[bytes, str]:
        process = await self._started()
        number = self._numbers.setdefault(source, len(self._numbers))
        seconds = self._render_time + len(variables) / BYTES_PER_SECOND
        question = {"template": number, "seconds": int(seconds) + 1, "variables": msgspec.Raw(variables)}
        if number not in self._sent:
            question["source"] = source
        answer = await self._answer(process, msgspec.json.encode(question), seconds)
        status = answer[:1]
        if status == frames.EXHAUSTED:
            await self._end()
            raise Broke("takes too much memory")
        if status != frames.NO_TEMPLATE:
            self._sent.add(number)
        return status, str(memoryview(answer)[1:], "utf-8")

    async def _started(self) -> asyncio.subprocess.Process:
        if self._closed:
            raise _Died
        if self._process is not None and self._process.returncode is None:
            return self._process
        self._sent = set()
        try:
            self._process = process = await _start()
            await self._answer(process, b"", START_TIME)
        except (OSError, Broke):
            raise _Died from None
        return process

    async def _answer(self, process: asyncio.subprocess.Process, question: bytes, seconds: float) -> bytes:
        """The process's next frame; it ends unless there is one. Raises Broke, _Died."""
        try:
            return await asyncio.wait_for(_exchange(process, question), seconds)
        except asyncio.TimeoutError:
            await self._end()
            raise Broke("takes too long") from None
        except (OSError, asyncio.IncompleteReadError):
            await self._end()
            raise _Died from None
        except BaseException:
            await self._end()
            raise

    async def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        while await process.stdout.read(1 << 20):  # else its transport stays open
            pass
        await process.wait()

    async def close(self) -> None:
        """End the process. Questions that wait for an answer get Broke."""
        self._closed = True
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
        async with self._lock:
            await self._end()


async def _start() -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        frames.PROGRAM,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)},
        start_new_session=True,  # Ctrl-C is not for it
        limit=1 << 20,
    )


async def _exchange(process: asyncio.subprocess.Process, question: bytes) -> bytes:
    """Write a frame (none if empty) and read one. Raises Broke for one that is too long."""
    assert process.stdin is not None
    assert process.stdout is not None
    if question:
        process.stdin.write(frames.frame(question))
        await process.stdin.drain()
    length = int.from_bytes(await process.stdout.readexactly(frames.HEADER), "big")
    if length > max(LARGEST_ANSWER, 4 * len(question)):
        raise Broke("makes a prompt that is too long")
    return await process.stdout.readexactly(length)


class _Strikes:
    """How often in a row a template broke the process, and until when it is refused for that."""

    def __init__(self) -> None:
        self._count = 0
        self._until = 0.0

    def check(self) -> None:
        """Raises InternalError for a template that has had its chances for now."""
        if (left := self._until - time.monotonic()) > 0:
            raise InternalError(
                f"The model's chat template broke {STRIKES} times in a row; it rests for {left:.0f} s.",
                retry_after=left,
            )

    def add(self) -> None:
        self._count += 1
        if self._count >= STRIKES:
            self._count = 0
            self._until = time.monotonic() + REFUSED_FOR

    def clear(self) -> None:
        self._count = 0


class Templates:
    """Prompts of models with a template of their own, and of those without any.

    Raises, besides InvalidRequest for what a template refuses, InternalError for a template that isn't
    one, takes too long or too much memory; after three times in a row that template rests for a minute.
    """

    def __init__(self, process: RenderProcess | None = None) -> None:
        self._process = process or RenderProcess()
        self._known: dict[int, tuple[ModelInfo, ModelTemplate]] = {}
        self._strikes: dict[str, _Strikes] = {}

    async def warm(self) -> None:
        """Start what the first prompt would have to wait for."""
        with suppress(Broke):  # whoever needs it hears of it
            await self._process.warm()

    async def close(self) -> None:
        await self._process.close()

    async def prompt(
        self, info: ModelInfo, request: ChatRequest, functions: Sequence[dict[str, Any]] | None = None
    ) -> Prompt:
        """The prompt of a request whose results are in the order of their calls (`pairing`).

        `functions` are the tools' functions as the client wrote them; without it they come from the request.
        """
        if info.chat_template is None:
            return await _call(request, plain_prompt, request, functions)
        template = self._template(info, info.chat_template)
        draft = await _call(request, template.draft, request, functions)
        rendered = await self._render(template.source, request, draft.attempts())
        return await _call(request, draft.prompt, rendered)

    async def _render(self, source: str, request: ChatRequest, attempts: Iterator[bytes]) -> str:
        """The text of the first attempt that the template accepts."""
        reason = ""
        while variables := await _call(request, next, attempts, b""):
            status, text = await self._ask(source, variables)
            if status == frames.RENDERED:
                return text
            if status == frames.NO_TEMPLATE:
                raise InternalError(f"The model's chat template is not valid: {text}")
            reason = reason or text
        raise InvalidRequest(
            f"The model's chat template can't render these messages: {reason}", param="messages"
        )

    async def _ask(self, source: str, variables: bytes) -> tuple[bytes, str]:
        strikes = self._strikes.setdefault(source, _Strikes())
        strikes.check()
        try:
            answer = await self._process.ask(source, variables)
        except Broke as error:
            strikes.add()
            raise InternalError(f"The model's chat template {error}.") from None
        strikes.clear()
        return answer

    def _template(self, info: ModelInfo, source: str) -> ModelTemplate:
        # Looked up by identity, which is quick; the entry keeps the object alive, so that it stays unique.
        known = self._known.get(id(info))
        if known is None:
            if len(source) > LONGEST_SOURCE:
                raise InternalError("The model's chat template is not valid: it is far too long.")
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            template = ModelTemplate(source, bos=info.bos, eos=info.eos, controls=info.controls)
            known = self._known[id(info)] = (info, template)
        return known[1]


async def _call(request: ChatRequest, function: Callable[..., T], *args: Any) -> T:
    """Call what takes time in proportion to the request: in a thread if that is much."""
    if (
        len(request.messages) < MANY
        and sum(len(message.content or "") for message in request.messages) < LARGE
    ):
        return function(*args)
    return await asyncio.to_thread(function, *args)
