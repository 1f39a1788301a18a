from __future__ import annotations

import argparse
import io
import json
from typing import Any

import pytest

from deepseek_api_compat.cli import render


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, capsysbinary: pytest.CaptureFixture[bytes]) -> Any:
    def run(*lines: Any) -> list[dict[str, Any]]:
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        parser = argparse.ArgumentParser(prog="deepseek-api")
        render.add_parser(parser.add_subparsers(required=True))
        args = parser.parse_args(["render"])
        assert args.run(args) == 0
        return [json.loads(line) for line in capsysbinary.readouterr().out.splitlines()]

    return run


def test_each_line_becomes_a_prompt_or_an_error(answers: Any) -> None:
    messages = [{"role": "user", "content": "你好"}]
    chat, gap, refused, unknown, broken = answers(
        {"format": "v3", "variant": "0324", "request": {"messages": messages}},
        {"format": "v3", "variant": "fim", "request": {"prompt": "a", "suffix": "b"}},
        {"format": "v3.1", "request": {"messages": []}},
        {"format": "v9", "request": {"messages": messages}},
        '{"format": "v3"',
    )
    prompt = "<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜>"
    assert chat == {"prompt": prompt, "prompt_ids": [0, 128803, 30594, 128804]}
    assert gap["prompt_ids"] == [128801, 67, 128800, 68, 128802]
    assert refused["error"]["param"] == "messages"
    assert refused["error"]["type"] == "invalid_request_error"
    assert unknown["error"]["param"] == "format"
    assert "not as needed" in broken["error"]["message"]


def test_each_format_has_its_own_tokenizer(answers: Any) -> None:
    request = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "thinking": False,
    }
    v31, v4, v41 = answers(*({"format": format, "request": request} for format in ("v3.1", "v4", "v4.1")))
    assert v31["prompt_ids"][-1] == 128799
    assert v4["prompt_ids"][-1] == 128822
    assert v41["prompt_ids"][1] == 128799
    assert v41["prompt"].startswith("<｜begin▁of▁sentence｜><｜System｜>")


def test_declared_functions_are_rendered_as_they_were_written(answers: Any) -> None:
    function = {"parameters": {"type": "object"}, "x_vendor": 1, "name": "now"}
    tools = [{"type": "function", "function": function}]
    request = {"messages": [{"role": "user", "content": "u"}], "tools": tools}
    (answer,) = answers({"format": "v3.2", "request": request})
    assert json.dumps(function) in answer["prompt"]
