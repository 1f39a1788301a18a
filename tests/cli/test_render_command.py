from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.protocol import deepseek

Answers = Callable[..., list[dict[str, Any]]]

GOLDEN = Path(__file__).parents[1] / "golden" / "prompts.jsonl"
PICTURE = {"type": "image_url", "image_url": "data:,"}
USER = {"role": "user", "content": "你好"}
CALL = {"id": "c", "type": "function", "function": {"name": "now", "arguments": "{}"}}
CALLED = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "9"},
]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
HISTORY = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜>"
    "<｜tool▁calls▁end｜><｜end▁of▁sentence｜><｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>9"
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
)


def test_each_line_becomes_a_prompt_or_an_error(answers_of: Answers) -> None:
    chat, refused, unknown, image, deep = answers_of(
        "render",
        {"format": "v3-0324", "request": {"messages": [USER]}},
        {"format": "v3.1", "request": {"messages": []}},
        {"format": "v9", "request": {"messages": [USER]}},
        {"format": "v3", "request": {"messages": [{"role": "user", "content": [PICTURE]}]}},
        '{"format": "v3", "request": ' + '{"a":' * 5000 + "1" + "}" * 5001,
    )
    prompt = "<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜>"
    assert chat == {"prompt": prompt, "prompt_ids": [0, 128803, 30594, 128804]}
    assert refused["error"]["param"] == "messages"
    assert refused["error"]["type"] == "invalid_request_error"
    assert unknown["error"]["param"] == "format"
    assert image["error"]["param"] == "messages[0].content"
    assert deep["error"]["message"] == "The line is nested too deeply."


@pytest.mark.parametrize("format", deepseek.FORMATS)
def test_a_gap_is_filled_in_every_format(answers_of: Answers, format: str) -> None:
    gap, no_suffix = answers_of(
        "render",
        {"format": format, "variant": "fim", "request": {"prompt": "a", "suffix": "b"}},
        {"format": format, "request": {"prompt": "a"}},
    )
    assert gap["prompt"] == "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>"
    assert gap["prompt_ids"] == [128801, 67, 128800, 68, 128802]
    assert no_suffix["error"]["param"] == "prompt"


def test_variants_of_v3_and_r1(answers_of: Answers) -> None:
    users = {"messages": [USER, USER], "tools": [TOOL]}
    called = {"messages": CALLED, "tools": [TOOL]}
    v3, v3_0324, same, tools, r1, official = answers_of(
        "render",
        {"format": "v3", "request": users},
        {"format": "v3", "variant": "0324", "request": users},
        {"format": "v3-0324", "request": users},
        {"format": "v3-tools", "request": called},
        {"format": "r1", "request": called},
        {"format": "r1", "variant": "official-tool-history", "request": called},
    )
    assert v3["prompt"] == "<｜begin▁of▁sentence｜><｜User｜>你好<｜User｜>你好<｜Assistant｜>"
    two = "<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜><｜User｜>你好<｜Assistant｜>"
    assert v3_0324["prompt"] == same["prompt"] == two
    for answer in (tools, r1):
        assert '{"name": "now", "parameters": {"type": "object"}}' in answer["prompt"]
        assert answer["prompt"].endswith(f"<｜User｜>你好<｜Assistant｜>{HISTORY}")
    assert official["prompt"] == f"<｜begin▁of▁sentence｜><｜User｜>你好<｜Assistant｜>{HISTORY}"


def test_each_format_has_its_own_tokenizer(answers_of: Answers) -> None:
    request = {
        "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
        "thinking": False,
    }
    lines = ({"format": format, "request": request} for format in ("v3.1", "v4", "v4.1"))
    v31, v4, v41 = answers_of("render", *lines)
    assert v31["prompt_ids"][-1] == 128799
    assert v4["prompt_ids"][-1] == 128822
    assert v41["prompt_ids"][1] == 128799
    assert v41["prompt"].startswith("<｜begin▁of▁sentence｜><｜System｜>")


def test_declared_functions_are_rendered_as_they_were_written(answers_of: Answers) -> None:
    function = {"parameters": {"type": "object", "additionalProperties": False}, "x_vendor": 1, "name": "now"}
    request = {"messages": [USER], "tools": [{"type": "function", "function": function}]}
    for format in ("v3-tools", "r1", "v3.2"):
        (answer,) = answers_of("render", {"format": format, "request": request})
        assert json.dumps(function) in answer["prompt"]


def test_golden_prompts_come_out_of_the_command(answers_of: Answers) -> None:
    """A sample: tests of the renderers compare them all."""
    records = [json.loads(line) for line in GOLDEN.read_bytes().splitlines()[::60]]
    records = [record for record in records if record["format"] != "v3-tools" and not record.get("defect")]
    answers = answers_of("render", *records)
    for record, answer in zip(records, answers, strict=True):
        assert answer.get("prompt") == record["prompt"]
        assert ("error" in answer) == (record["prompt"] is None)
