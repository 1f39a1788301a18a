import argparse
import io
import json
from typing import Any

import pytest

from deepseek_api_compat.cli import parse


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Any:
    def run(*lines: Any) -> list[dict[str, Any]]:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        parser = argparse.ArgumentParser(prog="deepseek-api")
        parse.add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["parse"])
        assert args.run(args) == 0
        return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]

    return run


def test_each_line_becomes_a_message_or_an_error(answers: Any) -> None:
    given = {"format": "r1", "start": "reasoning", "tools_declared": False, "engine_finish": "stop"}
    message, unknown, broken = answers(
        {**given, "output": "你</think>好", "chunks": ["你</th", "ink>好"]},
        {**given, "format": "v9", "output": ""},
        '{"format": "v3"',
    )
    assert message == {
        "content": "好",
        "reasoning_content": "你",
        "tool_calls": [],
        "finish_reason": "stop",
    }
    assert "not 'v9'" in unknown["error"]["message"]
    assert "error" in broken
