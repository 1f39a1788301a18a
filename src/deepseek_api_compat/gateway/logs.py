"""What the service writes to its log: lines of text or JSON, and never what clients send.

A filter that looks for secrets would miss some, so nothing that could quote a client gets this far: messages
are constant texts and ids of ours, and an exception is written as its type and its frames. Its message may
quote what it choked on, and is left out unless the operator asked for request bodies anyway.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sys
import threading
import traceback
from datetime import datetime, timezone
from types import TracebackType
from typing import IO, Any

import msgspec

from deepseek_api_compat.config import LogSettings
from deepseek_api_compat.gateway.account import outcome_of
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.security.keys import Principal

logger = logging.getLogger("deepseek_api")
MAX_BODY = 100_000  # characters of a body that is logged


class TextFormatter(logging.Formatter):
    """`2026-11-23T02:17:44.123Z WARNING worker 0: message name=value ...`, then the exception's frames."""

    def __init__(self, process: str, *, messages: bool) -> None:
        """`messages`: write those of exceptions too."""
        super().__init__()
        self._process = process
        self._messages = messages

    def format(self, record: logging.LogRecord) -> str:
        line = f"{_time(record)} {record.levelname} {self._process}: {record.getMessage()}"
        for name, value in _fields(record).items():
            line += f" {name}={value}"
        if record.exc_info and record.exc_info[1] is not None:
            line += "\n" + described(record.exc_info[1], messages=self._messages)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, process, message, fields, and `exception` if there is one."""

    def __init__(self, process: str, *, messages: bool) -> None:
        super().__init__()
        self._process = process
        self._messages = messages

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "process": self._process,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["exception"] = described(record.exc_info[1], messages=self._messages)
        return msgspec.json.encode(line, enc_hook=repr).decode()


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03}Z"


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What a call like `logger.info(message, extra={"fields": {...}})` gave besides the message."""
    found: dict[str, Any] = getattr(record, "fields", {})
    return found


def described(error: BaseException, *, messages: bool) -> str:
    """An exception and what caused it, as Python prints them, but without their messages.

    Of an OSError the system's own words stay: they name no more than the kind of fault.
    """
    parts = []
    seen: set[int] = set()
    next_one: BaseException | None = error
    while next_one is not None and id(next_one) not in seen:
        seen.add(id(next_one))
        frames = "".join(traceback.format_tb(next_one.__traceback__))
        parts.append(f"Traceback (most recent call last):\n{frames}{_name(next_one, messages)}")
        cause = next_one.__cause__
        next_one = cause or (None if next_one.__suppress_context__ else next_one.__context__)
    return "\n\nAfter that:\n\n".join(reversed(parts))


def _name(error: BaseException, messages: bool) -> str:
    kind = type(error).__qualname__
    if messages:
        return f"{kind}: {error}"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{kind}: [Errno {error.errno}] {os.strerror(error.errno)}"
    return kind


def configure(settings: LogSettings, process: str, stream: IO[str]) -> None:
    """Send everything that this process logs to `stream`.

    Other libraries are heard from `warning` up: below that they say what they work on.
    """
    formatter = {"text": TextFormatter, "json": JsonFormatter}[settings.format]
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter(process, messages=settings.bodies))
    level = logging.getLevelName(settings.level.upper())
    logging.root.handlers[:] = [handler]
    logging.root.setLevel(max(logging.WARNING, level))
    logger.setLevel(level)
    logging.captureWarnings(True)


def log_every_exception() -> None:
    """Let what nobody catches go through the log too, where Python would print it with its message."""

    def uncaught(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
        logger.critical("the process ends by an exception", exc_info=(kind, error, frames))

    def in_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None:
            logger.error("a thread ended by an exception", exc_info=args.exc_value)

    def unraisable(args: sys.UnraisableHookArgs) -> None:
        logger.error("an exception could not be raised", exc_info=args.exc_value)

    sys.excepthook = uncaught
    threading.excepthook = in_thread
    sys.unraisablehook = unraisable


def log_task_exceptions(loop: asyncio.AbstractEventLoop) -> None:
    """The same for tasks and callbacks of a loop, which would print results, arguments and exceptions."""

    def handle(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # What follows is the callback, with its arguments.
        what = re.split("(?<=callback) ", context["message"])[0]
        logger.error("asyncio: %s", what, exc_info=context.get("exception"))

    loop.set_exception_handler(handle)


class RequestLog:
    """A line for each request, or for those alone that failed on our side or were slow."""

    def __init__(self, settings: LogSettings) -> None:
        self._slow = 0.0 if settings.requests else settings.slow_seconds or float("inf")
        self._all = settings.requests

    def settled(
        self, request_id: str, principal: Principal | None, tally: Tally, cancelled: str | None, now: float
    ) -> None:
        """The request is over; `cancelled` is what `outcome_of` takes, `now` as `tally.start`."""
        if tally.status < 500 and (tally.first or now) - tally.start < self._slow:
            return
        message, level = "request", logging.INFO
        if tally.status >= 500:
            message, level = "request failed", logging.WARNING
        elif not self._all:
            message, level = "request was slow", logging.WARNING
        fields = _of_request(request_id, principal, tally, cancelled, now)
        logger.log(level, message, extra={"fields": fields})


def _of_request(
    request_id: str, principal: Principal | None, tally: Tally, cancelled: str | None, now: float
) -> dict[str, Any]:
    error = tally.error
    return {
        "request_id": request_id,
        "key_id": principal.id if principal else None,
        "token_id": principal.token_id if principal else None,
        "endpoint": tally.endpoint,
        "model": tally.model or None,
        "status": tally.status,
        "outcome": outcome_of(tally, cancelled),
        "error": (error.code or error.type) if error else None,
        "ms": round((now - tally.start) * 1000),
        "ttft_ms": round((tally.first - tally.start) * 1000) if tally.first else None,
        "prompt_tokens": tally.prompt_tokens,
        "cached_tokens": tally.cached_tokens,
        "completion_tokens": tally.completion_tokens,
        "reasoning_tokens": tally.reasoning_tokens,
    }


def log_body(request_id: str, body: bytes) -> None:
    """What `log.bodies` asks for."""
    text = body[: MAX_BODY * 4].decode(errors="backslashreplace")[:MAX_BODY]
    logger.info("request body", extra={"fields": {"request_id": request_id, "body": text}})
