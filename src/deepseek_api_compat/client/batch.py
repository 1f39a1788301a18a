"""Many requests, some of them at a time: in order, with a progress bar, and a file to go on from after a
crash.

The file has a line for each answer, `{"request": <SHA-256 of the request>, "answer": {...}}`. Two requests
that are equal take two lines. A last line without its end is what a crash has left, and is asked for again.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from typing import Any


class Batch:
    """One call of `create_batch`."""

    def __init__(
        self,
        requests: Iterable[Mapping[str, Any]],
        batch_size: int,
        checkpoint: str | PathLike[str] | None,
        progress: bool,
        read: Callable[[Any], Any],
    ) -> None:
        """`read` makes an answer of what the checkpoint has of it. Raises ValueError, OSError."""
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1.")
        self._requests = [dict(request) for request in requests]
        for n, request in enumerate(self._requests):
            if request.get("stream"):
                raise ValueError(f"Request {n} asks for a stream; a batch has whole answers.")
        self._size = batch_size
        self._progress = progress
        self._path = None if checkpoint is None else Path(checkpoint)
        self._answers: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._failed = False
        if self._path is not None:
            known = _known(self._path)
            for n, request in enumerate(self._requests):
                if found := known.get(_digest(request)):
                    self._answers[n] = read(found.popleft())

    def run(self, create: Callable[..., Any], *, return_exceptions: bool) -> list[Any]:
        with ExitStack() as stack:
            noted = self._notes(stack)

            def ask(n: int) -> None:
                if self._failed and not return_exceptions:
                    return
                try:
                    noted(n, create(**self._requests[n]))
                except Exception as error:
                    self._failed = True
                    noted(n, error)

            with ThreadPoolExecutor(self._size, "batch") as pool:
                try:
                    for _ in pool.map(ask, self._left()):
                        pass
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return self._result(return_exceptions)

    async def run_async(self, create: Callable[..., Awaitable[Any]], *, return_exceptions: bool) -> list[Any]:
        left = iter(self._left())

        async def ask_on() -> None:
            for n in left:
                if self._failed and not return_exceptions:
                    return
                try:
                    noted(n, await create(**self._requests[n]))
                except Exception as error:
                    self._failed = True
                    noted(n, error)

        with ExitStack() as stack:
            noted = self._notes(stack)
            tasks = [asyncio.create_task(ask_on()) for _ in range(self._size)]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
        return self._result(return_exceptions)

    def _left(self) -> list[int]:
        return [n for n in range(len(self._requests)) if n not in self._answers]

    def _notes(self, stack: ExitStack) -> Callable[[int, Any], None]:
        """What takes an answer or an error in: it is in the file when it counts."""
        from tqdm import tqdm

        total, known = len(self._requests), len(self._answers)
        bar = stack.enter_context(
            tqdm(total=total, initial=known, disable=not self._progress, unit="request")
        )
        file = None if self._path is None else stack.enter_context(self._path.open("ab"))

        def note(n: int, answer: Any) -> None:
            with self._lock:
                if file is not None and not isinstance(answer, Exception):
                    line = {"request": _digest(self._requests[n]), "answer": answer.model_dump(mode="json")}
                    file.write(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                    file.flush()
                self._answers[n] = answer
                bar.update()

        return note

    def _result(self, return_exceptions: bool) -> list[Any]:
        answers = [self._answers[n] for n in sorted(self._answers)]
        if not return_exceptions:
            for answer in answers:
                if isinstance(answer, Exception):
                    raise answer
        return answers


def _digest(request: Mapping[str, Any]) -> str:
    written = json.dumps(request, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(written.encode()).hexdigest()


def _known(path: Path) -> dict[str, deque[Any]]:
    """The answers that a file has, by request. Ends a line that was cut."""
    known: defaultdict[str, deque[Any]] = defaultdict(deque)
    if not path.exists():
        return known
    data = path.read_bytes()
    *lines, cut = data.split(b"\n")
    if cut:
        with open(path, "r+b") as file:
            file.truncate(len(data) - len(cut))
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            known[entry["request"]].append(entry["answer"])
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}, line {number}: this is no checkpoint of create_batch.") from None
    return known
