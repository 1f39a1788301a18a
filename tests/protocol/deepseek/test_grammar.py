"""Whatever a grammar allows, the format's parser reads as exactly the calls that were forced."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.deepseek.grammar import syntax
from deepseek_api_compat.protocol.events import Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.grammar import Grammar, constraint
from deepseek_api_compat.protocol.job import Piece
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat
from deepseek_api_compat.protocol.output_tags import TagParser
from fakes.grammar_sampler import sample
from fakes.json_validator import mismatches

FORMATS = ("v3", "v3-0324", "v3-tools", "r1", "v3.1", "v3.2", "v4", "v4.1", "template")
POINT = {"type": "object", "properties": {"lat": {"type": "number"}, "next": {"$ref": "#/$defs/point"}}}
SCHEMAS: dict[str, dict[str, Any]] = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"enum": ["°C", "°F", 3, None]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 3},
            "note": {"type": ["string", "null"]},
            "wind": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
            "extra": {},
            "where": {"$ref": "#/$defs/point"},
            "date": {"type": "string", "format": "date"},
            "kind": {"const": "käse"},
        },
        "required": ["city", "unit"],
        "$defs": {"point": POINT},
    },
    "nothing": {"type": "object", "properties": {}},
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "anything": {"type": "object"},
    "either": {
        "anyOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
        ]
    },
}


def wanted(format: str, start: str, schemas: dict[str, Any], strict: bool = False, **fields: Any) -> Grammar:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}}
        for name, schema in schemas.items()
    ]
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "tools": tools, **fields}
    grammar = constraint(decode_chat(json.dumps(body).encode(), DecodeLimits()), syntax(format), start)
    assert grammar is not None
    return grammar


def read(format: str, start: str, text: str) -> tuple[str, str, list[tuple[str, Any]], str]:
    """Content, reasoning, calls with parsed arguments, and the reason to finish."""
    parser: Any
    if format == "template":
        parser = TagParser(start=start, tools_declared=True)
    else:
        name = "v3" if format == "v3-0324" else format
        parser = output.parser(name, start=start, tools_declared=True, tools=[*SCHEMAS])
    events = [event for char in text for event in parser.feed(Piece(text=char))]
    events += [*parser.feed(Piece(finish="stop")), *parser.close()]
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, ToolCall):
            if event.call_index == len(calls):
                calls.append([event.name or "", ""])
            calls[event.call_index][1] += event.arguments
    return (
        "".join(event.text for event in events if isinstance(event, Text)),
        "".join(event.text for event in events if isinstance(event, Reasoning)),
        [(name, json.loads(arguments)) for name, arguments in calls],
        next(event.reason for event in events if isinstance(event, Finish)),
    )


def assert_valid(calls: list[tuple[str, Any]]) -> None:
    for name, arguments in calls:
        schema = SCHEMAS[name]
        assert isinstance(arguments, dict)
        assert [*mismatches(arguments, schema, schema)] == []


@pytest.mark.parametrize("format", FORMATS)
def test_required_calls(format: str) -> None:
    rng = random.Random(1)
    for start in ("content", "reasoning"):
        grammar = wanted(format, start, SCHEMAS, tool_choice="required", parallel_tool_calls=True)
        for _ in range(60):
            text = sample(grammar, rng)
            content, _, calls, finish = read(format, start, text)
            assert (content, finish) == ("", "tool_calls"), text
            assert calls, text
            assert_valid(calls)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", SCHEMAS)
def test_a_named_tool_is_called_once(format: str, name: str) -> None:
    rng = random.Random(2)
    choice = {"type": "function", "function": {"name": name}}
    grammar = wanted(format, "content", SCHEMAS, tool_choice=choice)
    for _ in range(20):
        _, _, calls, finish = read(format, "content", sample(grammar, rng))
        assert ([called for called, _ in calls], finish) == ([name], "tool_calls")
        assert_valid(calls)


@pytest.mark.parametrize("format", ["v4", "v4.1"])
def test_a_block_that_the_prompt_has_opened(format: str) -> None:
    grammar = wanted(format, "tool_calls", SCHEMAS, tool_choice="required")
    content, _, calls, _ = read(format, "tool_calls", sample(grammar, random.Random(3)))
    assert content == ""
    assert_valid(calls)


@pytest.mark.parametrize("format", FORMATS)
def test_strict_tools_that_the_model_may_call(format: str) -> None:
    rng = random.Random(4)
    grammar = wanted(format, "content", SCHEMAS, strict=True)
    found = [read(format, "content", sample(grammar, rng)) for _ in range(60)]
    for _, _, calls, _ in found:
        assert_valid(calls)
    assert any(calls for _, _, calls, _ in found)
    assert any(content and not calls for content, _, calls, _ in found)


def written(format: str, name: str) -> str:
    choice = {"type": "function", "function": {"name": name}}
    return sample(wanted(format, "content", SCHEMAS, tool_choice=choice), random.Random(0))


def test_layouts() -> None:
    """As the golden prompts write a call of the history."""
    markers = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    assert written("v3", "nothing") == markers.format("function<｜tool▁sep｜>nothing\n```json\n{}\n```")
    assert written("v3.1", "nothing") == markers.format("nothing<｜tool▁sep｜>{}")
    assert written("v3.2", "nothing") == (
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="nothing">\n\n</｜DSML｜invoke>\n'
        "</｜DSML｜function_calls>"
    )
    assert written("v4", "nothing") == (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="nothing">\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )
    assert written("v4.1", "nothing") == (
        '\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="nothing">\n\n</｜DSML｜ invoke>\n</｜DSML｜ calls>'
    )
    assert written("template", "nothing") == (
        '<tool_call>\n{"name": "nothing", "arguments": {}}\n</tool_call>'
    )


def test_dsml_parameters() -> None:
    schema = {
        "type": "object",
        "properties": {"s": {"type": "string", "enum": ["ä"]}, "n": {"const": 1}, "t": {"type": "boolean"}},
        "required": ["s", "n"],
    }
    grammar = wanted("v3.2", "content", {"f": schema}, tool_choice="required", parallel_tool_calls=False)
    made = {sample(grammar, random.Random(seed)) for seed in range(30)}
    head = (
        '\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n'
        '<｜DSML｜parameter name="s" string="true">ä</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>\n'
    )
    flag = '<｜DSML｜parameter name="t" string="false">{}</｜DSML｜parameter>\n'
    tail = "</｜DSML｜invoke>\n</｜DSML｜function_calls>"
    assert made == {head + flags + tail for flags in ("", flag.format("true"), flag.format("false"))}


def test_a_parameter_that_allows_itself() -> None:
    options = [{"type": "integer"}, *[{"$ref": "#/$defs/all"}] * 10]
    schema = {"properties": {"a": {"$ref": "#/$defs/all"}}, "$defs": {"all": {"anyOf": options}}}
    text = sample(wanted("v4", "content", {"f": schema}, tool_choice="required"), random.Random(5))
    assert '<｜DSML｜parameter name="a" string="false">' in text
