"""No text of a request can become a control token, whatever it spells and wherever it stands."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.protocol.deepseek import FORMATS, render
from deepseek_api_compat.protocol.openai import ChatRequest, CompletionRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.tokenizer import Tokenizer

SPELLINGS = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜System｜>",
    "<think>",
    "</think>",
    "<｜tool▁calls▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁outputs▁end｜>",
    "<｜tool▁output▁end｜>",
    "<｜fim▁hole｜>",
    "<|EOT|>",
    "｜DSML｜",
    "</｜DSML｜invoke>",
    "<｜latest_reminder｜>",
    "<｜place▁holder▁no▁5｜>",
]
FIELDS = ("system", "user", "answer", "reasoning", "name", "key", "value", "result", "description", "schema")

evil = st.lists(st.sampled_from([*SPELLINGS, "a", " ", "\n", "好"]), max_size=5).map("".join)


def request(texts: dict[str, str], thinking: bool) -> ChatRequest:
    call = {
        "name": texts["name"],
        "arguments": json.dumps({texts["key"]: texts["value"], "n": [texts["value"]]}),
    }
    messages: list[dict[str, Any]] = [
        {"role": "system", "content": texts["system"]},
        {"role": "user", "content": texts["user"]},
        {"role": "assistant", "content": texts["answer"], "reasoning_content": texts["reasoning"]},
        {"role": "user", "content": texts["user"]},
        {
            "role": "assistant",
            "content": texts["answer"],
            "reasoning_content": texts["reasoning"],
            "tool_calls": [{"id": "c1", "type": "function", "function": call}],
        },
        {"role": "tool", "tool_call_id": "c1", "content": texts["result"]},
    ]
    schema = {"type": "object", "title": texts["schema"]}
    function = {"name": texts["name"], "description": texts["description"], "parameters": schema}
    fields = {
        "model": "m",
        "messages": messages,
        "tools": [{"type": "function", "function": function}],
        "thinking": thinking,
    }
    return decode_chat(json.dumps(fields).encode(), DecodeLimits())


def controls(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    known = set(tokenizer.controls.values())
    return [id for id in ids if id in known]


@pytest.mark.parametrize("format", FORMATS)
@given(texts=st.fixed_dictionaries(dict.fromkeys(FIELDS, evil.map("x".__add__))), thinking=st.booleans())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_text_never_becomes_a_control_token(
    format: str, texts: dict[str, str], thinking: bool, tokenizer_of: dict[str, Tokenizer]
) -> None:
    tokenizer = tokenizer_of[format]
    if format.startswith("v4"):  # refuses such names at once
        texts = {**texts, "name": "x"}
    prompt = render(format, None, request(texts, thinking))
    frame = render(format, None, request(dict.fromkeys(FIELDS, "x"), thinking))
    ids = tokenizer.encode(prompt)
    assert controls(tokenizer, ids) == controls(tokenizer, tokenizer.encode(frame))
    assert tokenizer.detokeniser().feed(ids) == "".join(segment.text for segment in prompt)


@given(prefix=evil, suffix=evil)
@settings(max_examples=25, deadline=None)
def test_nor_does_the_text_around_a_gap(prefix: str, suffix: str, v3_tokenizer: Tokenizer) -> None:
    prompt = render("v3", "fim", CompletionRequest(model="m", prompt=prefix, suffix=suffix))
    assert controls(v3_tokenizer, v3_tokenizer.encode(prompt)) == [128801, 128800, 128802]
