"""What the log looks like, and what is never in it."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.config import LogSettings
from deepseek_api_compat.gateway.logs import (
    RequestLog,
    configure,
    described,
    log_body,
    log_task_exceptions,
    logger,
)
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.security.keys import Principal

CANARY = "the-canary-sings"
PRINCIPAL = Principal(id="c7xq2mfa6tkd", name="alice", role="user", index=0, token_id="token-1")


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.handlers[:], root.level, logger.level
    yield
    logging.captureWarnings(False)
    root.handlers[:] = before[0]
    root.setLevel(before[1])
    logger.setLevel(before[2])


def logging_to(**settings: Any) -> io.StringIO:
    stream = io.StringIO()
    configure(LogSettings(**settings), "worker 3", stream)
    return stream


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def fail(*_: object) -> None:
    """Raises an exception, and one after it, that both quote what a client sent."""
    try:
        int(CANARY)
    except ValueError as error:
        raise KeyError(CANARY) from error


def test_json_is_one_object_a_line() -> None:
    stream = logging_to(format="json")
    logger.warning("two\nlines", extra={"fields": {"request_id": "req-1", "ms": 5}})
    [line] = lines(stream)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning",
        "process": "worker 3",
        "message": "two\nlines",
        "request_id": "req-1",
        "ms": 5,
    }


def test_text_has_the_same() -> None:
    stream = logging_to()
    logger.warning("disk %s", "full", extra={"fields": {"request_id": "req-1"}})
    assert stream.getvalue().rstrip().endswith("Z WARNING worker 3: disk full request_id=req-1")


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_exception_has_its_frames_and_causes_but_no_message(format: str) -> None:
    stream = logging_to(format=format)
    try:
        fail()
    except KeyError:
        logger.exception("request %s failed", "req-1")
    text = stream.getvalue()
    for expected in ("Traceback", "ValueError", "KeyError", "in fail", "request req-1 failed"):
        assert expected in text
    assert CANARY not in text


def test_of_an_os_error_the_kind_of_fault_is_told() -> None:
    try:
        Path(f"/nowhere/{CANARY}").read_bytes()
    except OSError as error:
        text = described(error, messages=False)
    assert text.endswith("FileNotFoundError: [Errno 2] No such file or directory")
    assert CANARY not in text


def test_a_chain_of_exceptions_that_bites_its_tail_ends() -> None:
    first, second = ValueError(), KeyError()
    first.__cause__, second.__cause__ = second, first
    assert described(first, messages=False).count("Traceback") == 2


def test_messages_are_there_if_bodies_are_wanted() -> None:
    stream = logging_to(bodies=True)
    try:
        fail()
    except KeyError:
        logger.exception("failed")
    log_body("req-1", b'{"prompt": "' + CANARY.encode() + b'\xff"}')
    assert stream.getvalue().count(CANARY) >= 3


def test_other_libraries_are_heard_from_warning_up() -> None:
    stream = logging_to(level="debug", format="json")
    logging.getLogger("httpx").info("GET https://user:%s@example.com", CANARY)
    logging.getLogger("uvicorn.error").warning("Invalid HTTP request received.")
    logger.debug("ours")
    assert [line["message"] for line in lines(stream)] == ["Invalid HTTP request received.", "ours"]


def test_the_level_counts_for_everybody() -> None:
    stream = logging_to(level="error", format="json")
    logging.getLogger("uvicorn.error").warning("not this")
    logger.warning("nor this")
    logger.error("this")
    assert [line["message"] for line in lines(stream)] == ["this"]


async def test_what_no_task_catches_is_logged_without_what_it_quotes() -> None:
    stream = logging_to(format="json")
    log_task_exceptions(asyncio.get_running_loop())

    async def failing() -> None:
        fail()

    task = asyncio.ensure_future(failing())
    await asyncio.wait([task])
    del task
    asyncio.get_running_loop().call_soon(fail, CANARY)
    await asyncio.sleep(0.01)
    never, called = lines(stream)
    assert never["message"] == "asyncio: Task exception was never retrieved"
    assert called["message"] == "asyncio: Exception in callback"
    assert "ValueError" in never["exception"]
    assert CANARY not in stream.getvalue()


def test_what_ends_a_process_or_a_thread_is_logged_without_what_it_quotes() -> None:
    program = (
        "import sys, threading\n"
        "from deepseek_api_compat.config import LogSettings\n"
        "from deepseek_api_compat.gateway.logs import configure, log_every_exception\n"
        "configure(LogSettings(format='json'), 'worker 0', sys.stderr)\n"
        "log_every_exception()\n"
        f"def fail(): raise ValueError({CANARY!r}.upper())\n"
        "thread = threading.Thread(target=fail); thread.start(); thread.join()\n"
        "class Odd:\n"
        "    def __del__(self): fail()\n"
        "odd = Odd(); del odd\n"
        "fail()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    found = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["level"] for line in found] == ["error", "error", "critical"]
    assert CANARY.upper() not in done.stderr


def settled(status: int, seconds: float, first: float = 0.0, **settings: Any) -> list[dict[str, Any]]:
    """The lines about a request that took so long to its first token and to its end."""
    stream = logging_to(format="json")
    tally = Tally("/chat/completions", 100.0)
    tally.model, tally.status, tally.prompt_tokens = "tiny", status, 7
    tally.first = 100.0 + first if first else 0.0
    RequestLog(LogSettings(**settings)).settled("req-1", PRINCIPAL, tally, None, 100.0 + seconds)
    return lines(stream)


def test_every_request_has_a_line_if_wanted() -> None:
    [line] = settled(200, 1.5, 0.25, requests=True)
    assert line.pop("time")
    assert line == {
        "level": "info",
        "process": "worker 3",
        "message": "request",
        "request_id": "req-1",
        "key_id": "c7xq2mfa6tkd",
        "token_id": "token-1",
        "endpoint": "/chat/completions",
        "model": "tiny",
        "status": 200,
        "outcome": "ok",
        "error": None,
        "ms": 1500,
        "ttft_ms": 250,
        "prompt_tokens": 7,
        "cached_tokens": 0,
        "completion_tokens": 0,
        "reasoning_tokens": 0,
    }


@pytest.mark.parametrize(
    ("status", "seconds", "first", "message"),
    [
        (200, 1.0, 0.5, None),
        (429, 0.1, 0.0, None),
        (499, 0.1, 0.0, None),
        (500, 0.1, 0.0, "request failed"),
        (503, 99.0, 0.0, "request failed"),
        (200, 600.0, 1.0, None),  # long, but it began soon
        (200, 40.0, 31.0, "request was slow"),
        (200, 31.0, 0.0, "request was slow"),
    ],
)
def test_else_only_faults_of_ours_and_slow_ones(
    status: int, seconds: float, first: float, message: str | None
) -> None:
    found = settled(status, seconds, first)
    assert [line["message"] for line in found] == ([message] if message else [])
    assert all(line["level"] == "warning" for line in found)


def test_no_request_is_slow_if_that_is_not_wanted() -> None:
    assert settled(200, 9999.0, slow_seconds=0.0) == []
