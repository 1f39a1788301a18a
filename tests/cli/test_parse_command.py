from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from deepseek_api_compat.protocol.deepseek import output

Answers = Callable[..., list[dict[str, Any]]]

BLOCK = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
V3 = BLOCK.format('function<｜tool▁sep｜>add\n```json\n{"a": 1}\n```')
V31 = BLOCK.format('add<｜tool▁sep｜>{"a": 1}')
DSML = (
    '\n\n<｜DSML｜{2}{0}>\n<｜DSML｜{2}invoke name="add">\n<｜DSML｜{2}parameter name="a" string="false">1'
    "</｜DSML｜{2}parameter>\n</｜DSML｜{2}invoke>\n</｜DSML｜{2}{1}>"
)
CALLS = {
    "v3": V3,
    "v3-0324": V3,
    "v3-tools": V3,
    "r1": V3,
    "v3.1": V31,
    "v3.2": DSML.format("function_calls", "function_calls", ""),
    "v4": DSML.format("tool_calls", "tool_calls", ""),
    "v4.1": DSML.format("calls", "calls", " "),
    "template": '\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>',
}


def line(format: str, text: str, **fields: Any) -> dict[str, Any]:
    given = {"start": "content", "tools_declared": True, "tools": ["add"], "engine_finish": "stop"}
    return {"format": format, "output": text, **given, **fields}


@pytest.mark.parametrize("format", CALLS)
def test_every_format_has_a_parser(answers_of: Answers, format: str) -> None:
    call, thought, cut = answers_of(
        "parse",
        line(format, f"Let me add.{CALLS[format]}"),
        line(format, "Hmm</think>Hello", start="reasoning", tools_declared=False, tools=None),
        line(format, "Hello", engine_finish="length"),
    )
    (made,) = call.pop("tool_calls")
    assert made.pop("id").startswith("call_")
    assert json.loads(made["function"].pop("arguments")) == {"a": 1}
    assert made == {"type": "function", "function": {"name": "add"}}
    assert call == {"content": "Let me add.", "reasoning_content": None, "finish_reason": "tool_calls"}
    plain = {"content": "Hello", "reasoning_content": None, "tool_calls": [], "finish_reason": "stop"}
    assert thought == {**plain, "reasoning_content": "Hmm"}
    assert cut == {**plain, "finish_reason": "length"}


def test_every_parser_has_its_format_here() -> None:
    assert set(output.FORMATS) <= set(CALLS)


def test_the_output_may_come_in_chunks(answers_of: Answers) -> None:
    whole, chunks, none = answers_of(
        "parse",
        line("r1", "你</think>好", start="reasoning"),
        line("r1", "", start="reasoning", chunks=["你</th", "", "ink>好"]),
        line("r1", "你", start="reasoning", chunks=[]),
    )
    assert whole == chunks
    assert (whole["reasoning_content"], whole["content"]) == ("你", "好")
    assert (none["reasoning_content"], none["content"]) == (None, None)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"format": "v9"}, "format"),
        ({"format": "v3", "start": "middle"}, "start"),
        ({"format": "template", "start": "tool_calls"}, "start"),
        ({"engine_finish": "tool_calls"}, "engine_finish"),
        ({"tools": "add"}, "tools"),
        ({"chunks": ["a", 1]}, "chunks[1]"),
    ],
)
def test_a_wrong_field_is_named(answers_of: Answers, fields: dict[str, Any], param: str) -> None:
    (answer,) = answers_of("parse", {**line("v3", "a"), **fields})
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"
