from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

Answers = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def answers_of(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Answers:
    """What a command that reads JSON lines says to lines given as bytes, as text, or as what JSON means."""

    def run(command: str, *lines: Any) -> list[dict[str, Any]]:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(map(_line, lines)))))
        parser = argparse.ArgumentParser(prog="deepseek-api")
        import_module(f"deepseek_api_compat.cli.{command}").add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args([command])
        assert args.run(args) == 0
        return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]

    return run


def _line(line: Any) -> bytes:
    if isinstance(line, bytes):
        return line
    return line.encode() if isinstance(line, str) else json.dumps(line).encode()
