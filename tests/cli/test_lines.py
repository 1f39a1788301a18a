"""What `render` and `parse` have in common: a bad line is answered, and the next one comes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

Answers = Callable[..., list[dict[str, Any]]]

GOOD = {
    "render": {"format": "v3", "request": {"messages": [{"role": "user", "content": "Hi"}]}},
    "parse": {
        "format": "v3",
        "output": "Hi",
        "start": "content",
        "tools_declared": False,
        "engine_finish": "stop",
    },
}
BAD: dict[str, tuple[bytes, str, str | None]] = {
    "not JSON": (b'{"format": "v3"', "not valid JSON", None),
    "not an object": (b"[1]", "Expected `object`", None),
    "not UTF-8": (b'{"format": "v3", "x": "\xff"}', "not valid UTF-8 (byte 23)", None),
    "half a surrogate pair": (b'{"format": "\\ud800"}', "not valid JSON", None),
    "too deep": (b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply", None),
    "a field missing": (b"{}", "missing required field `format`", "format"),
    "a field of another type": (b'{"format": 3}', "Expected `str`, got `int`", "format"),
}


@pytest.mark.parametrize("command", GOOD)
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_answered_by_an_error_and_the_next_line_comes(
    answers_of: Answers, command: str, bad: str
) -> None:
    line, says, param = BAD[bad]
    error, good = answers_of(command, line, b"", b" \r", GOOD[command])
    assert says in error["error"].pop("message")
    assert error == {"error": {"type": "invalid_request_error", "param": param, "code": None}}
    assert "error" not in good


@pytest.mark.parametrize("command", GOOD)
def test_each_answer_is_written_at_once_and_a_closed_reader_ends_it_quietly(command: str) -> None:
    run = "import sys; from deepseek_api_compat.cli import main; sys.exit(main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", run, command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.write(b"{}\n")
        process.stdin.flush()
        assert b"error" in os.read(process.stdout.fileno(), 4096)  # while the input is still open
        process.stdout.close()
        process.stdin.write(b"{}\n{}\n")
        process.stdin.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
