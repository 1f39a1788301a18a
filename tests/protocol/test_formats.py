"""What a format decides for a request: where its answer starts, who reads it, and what it may be."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol import formats
from deepseek_api_compat.protocol.deepseek.output_dsml import DsmlParser
from deepseek_api_compat.protocol.deepseek.output_markers import MarkerParser
from deepseek_api_compat.protocol.openai import ChatRequest
from deepseek_api_compat.protocol.output import OutputParser
from deepseek_api_compat.protocol.output_tags import TagParser

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
USER = {"role": "user", "content": "Go."}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [
    USER,
    {"role": "assistant", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "x"},
]


def request(**fields: Any) -> ChatRequest:
    return msgspec.convert({"model": "m", "messages": [USER], **fields}, ChatRequest)


@pytest.mark.parametrize(
    ("format", "fields", "start"),
    [
        ("v3", {}, "content"),
        ("v3-0324", {"tools": [TOOL]}, "content"),
        ("r1", {}, "reasoning"),
        ("r1", {"tools": [TOOL]}, "either"),
        ("r1", {"tools": [TOOL], "messages": CALLED}, "either"),
        ("v3.1", {}, "content"),
        ("v3.1", {"thinking": True}, "reasoning"),
        ("v3.1", {"tools": [TOOL], "messages": CALLED}, "content"),
        ("v3.2", {"thinking": {"type": "enabled"}}, "reasoning"),
        ("v3.2", {"thinking": True, "tools": [TOOL], "messages": CALLED}, "reasoning"),
        ("v3.2", {"reasoning_effort": "none"}, "content"),
        ("v4", {}, "reasoning"),
        ("v4", {"thinking": False}, "content"),
        ("v4", {"tools": [TOOL], "tool_choice": "required"}, "tool_calls"),
        (
            "v4.1",
            {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
            "tool_calls",
        ),
    ],
)
def test_where_the_answer_starts(format: str, fields: dict[str, Any], start: str) -> None:
    assert formats.prompt(format, request(**fields), None).start == start


@pytest.mark.parametrize("format", ["v3", "v3-0324", "r1", "v3.1", "v3.2", "v4", "v4.1"])
def test_an_answer_goes_on_where_its_prefix_ends(format: str) -> None:
    asked = request(messages=[USER, {"role": "assistant", "content": "It", "prefix": True}], thinking=False)
    prompt = formats.prompt(format, asked, None)
    assert prompt.start == "content_continuation"
    assert prompt.segments[-1].text.endswith("It")


def test_a_thought_goes_on_too() -> None:
    begun = {"role": "assistant", "content": "Hm", "prefix": True}
    prompt = formats.prompt("v3.1", request(messages=[USER, begun], thinking=True), None)
    assert prompt.start == "reasoning_continuation"


def test_v3_with_tools_shows_them() -> None:
    text = "".join(
        segment.text for segment in formats.prompt("v3-0324", request(tools=[TOOL]), None).segments
    )
    assert '"name": "f"' in text or "### f" in text
    without = request(tools=[TOOL], tool_choice="none")
    assert len(formats.prompt("v3-0324", without, None).segments) < 6


@pytest.mark.parametrize(
    ("format", "fields", "start", "reader"),
    [
        ("v3.1", {}, "content", MarkerParser),
        ("v3-0324", {"tools": [TOOL]}, "content", MarkerParser),
        ("v4", {}, "reasoning", DsmlParser),
        ("template", {}, "content", OutputParser),
        ("template", {"tools": [TOOL]}, "content", TagParser),
        ("template", {"tools": [TOOL], "tool_choice": "none"}, "content", OutputParser),
        ("template", {}, "either", TagParser),
    ],
)
def test_who_reads_the_answer(format: str, fields: dict[str, Any], start: str, reader: type) -> None:
    assert type(formats.parser(format, request(**fields), start)) is reader


def test_a_gap_is_filled_by_models_that_have_tokens_for_it() -> None:
    controls = {"<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"}
    segments = formats.fill_in("def f(", "return x", controls)
    assert "".join(s.text for s in segments) == "<｜fim▁begin｜>def f(<｜fim▁hole｜>return x<｜fim▁end｜>"
    with pytest.raises(InvalidRequest) as caught:
        formats.fill_in("def f(", "return x", {"<|im_start|>"})
    assert caught.value.param == "suffix"


def test_markers_are_the_control_tokens_that_the_model_has() -> None:
    assert formats.markers({"<think>": 1, "</think>": 2, "<|im_end|>": 3}) == ("<think>", "</think>")
