"""What a request says about the shape of its answer, as a grammar."""

from __future__ import annotations

import json
from typing import Any

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.grammar import (
    ANY_OBJECT,
    MOST_CALLS,
    Exactly,
    Free,
    GenericCalls,
    Grammar,
    Json,
    OneOf,
    Repeat,
    Seq,
    Until,
    constraint,
)
from deepseek_api_compat.protocol.openai import ChatRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.segment import Segment

CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
NAMED = {"type": "function", "function": {"name": "weather"}}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY}}
BREAK = Segment("\n", False)
OPENING = Exactly((Segment("<tool_call>", True), BREAK))
CLOSING = Exactly((BREAK, Segment("</tool_call>", True)))


def tool(name: str, parameters: Any = CITY, strict: bool | None = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters, "strict": strict}}


def request(*tools: dict[str, Any], **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    if tools:
        body["tools"] = tools
    return decode_chat(json.dumps(body).encode(), DecodeLimits())


def grammar(*tools: dict[str, Any], start: str = "content", **fields: Any) -> Grammar | None:
    return constraint(request(*tools, **fields), GenericCalls(), start)


def call(name: str, schema: Any = CITY) -> Seq:
    head = Exactly((Segment(f'{{"name": "{name}", "arguments": ', False),))
    return Seq((head, Json(schema), Exactly((Segment("}", False),))))


@pytest.mark.parametrize(
    "free",
    [
        grammar(),
        grammar(tool("weather")),
        grammar(tool("weather"), tool_choice="auto"),
        grammar(tool("weather", strict=True), tool_choice="none"),
        grammar(response_format={"type": "text"}),
    ],
)
def test_nothing_to_enforce(free: Grammar | None) -> None:
    assert free is None


def test_response_format() -> None:
    assert grammar(response_format={"type": "json_object"}) == Json(ANY_OBJECT)
    assert grammar(response_format=JSON_SCHEMA) == Json(CITY)
    assert grammar(tool("weather"), response_format=JSON_SCHEMA, tool_choice="none") == Json(CITY)


def test_response_format_or_a_call() -> None:
    found = grammar(tool("weather"), response_format=JSON_SCHEMA, parallel_tool_calls=False)
    assert found == OneOf((Json(CITY), Seq((OPENING, call("weather", ANY_OBJECT), CLOSING))))


def test_a_named_tool_is_called_once() -> None:
    found = grammar(tool("time"), tool("weather"), tool_choice=NAMED, parallel_tool_calls=True)
    assert found == Seq((OPENING, call("weather"), CLOSING))


def test_required_calls_any_of_the_tools() -> None:
    either = OneOf((call("time"), call("weather")))
    tools = tool("time"), tool("weather")
    assert grammar(*tools, tool_choice="required") == Seq((OPENING, either, CLOSING))
    further = Seq((Exactly((*CLOSING.segments, BREAK, *OPENING.segments)), either))
    assert grammar(*tools, tool_choice="required", parallel_tool_calls=True) == Seq(
        (OPENING, either, Repeat(further, MOST_CALLS - 1), CLOSING)
    )


def test_forced_calls_come_before_a_response_format() -> None:
    found = grammar(tool("weather"), tool_choice="required", response_format=JSON_SCHEMA)
    assert found == Seq((OPENING, call("weather"), CLOSING))


def test_a_prompt_that_has_opened_the_block() -> None:
    found = grammar(tool("weather"), tool_choice="required", start="tool_calls")
    assert found == Seq((call("weather"), CLOSING))


def test_only_strict_tools_are_held_to_their_schema_when_the_model_may_choose() -> None:
    tools = tool("weather", strict=True), tool("time", {"not": {}})
    found = grammar(*tools, parallel_tool_calls=False)
    marker = Until(OPENING.segments, ("<tool_call>",))
    either = OneOf((call("weather"), call("time", ANY_OBJECT)))
    assert found == OneOf((Free(("<tool_call>",)), Seq((marker, either, CLOSING))))


def test_thoughts_come_first_and_are_free() -> None:
    thought = Until((Segment("</think>", True),), ("</think>",))
    think = Exactly((Segment("<think>", True),))
    for start in ("reasoning", "reasoning_continuation"):
        assert grammar(response_format=JSON_SCHEMA, start=start) == Seq((thought, Json(CITY)))
    found = grammar(response_format=JSON_SCHEMA, start="either")
    assert found == OneOf((Seq((think, thought, Json(CITY))), Json(CITY)))


def test_tool_without_parameters_takes_none() -> None:
    found = grammar(tool("weather", None), tool_choice="required")
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    assert found == Seq((OPENING, call("weather", nothing), CLOSING))


@pytest.mark.parametrize(
    ("tools", "fields", "param"),
    [
        ([], {"tool_choice": "required"}, "tool_choice"),
        ([], {"tool_choice": NAMED}, "tool_choice"),
        ([tool("time")], {"tool_choice": NAMED}, "tool_choice"),
        ([tool("a<b")], {"tool_choice": "required"}, "tools[0].function.name"),
        (
            [tool("time"), tool("weather", {"properties": {"a": {"not": {}}}})],
            {"tool_choice": "required"},
            "tools[1].function.parameters.properties.a.not",
        ),
        (
            [tool("time", {"type": "string"})],
            {"tool_choice": "required"},
            "tools[0].function.parameters.type",
        ),
        ([tool("time", {"not": {}}, strict=True)], {}, "tools[0].function.parameters.not"),
        (
            [],
            {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"not": {}}}}},
            "response_format.json_schema.schema.not",
        ),
    ],
)
def test_what_is_refused(tools: list[dict[str, Any]], fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        grammar(*tools, **fields)
    assert caught.value.param == param


def test_an_answer_that_continues_a_message_can_not_be_all_json() -> None:
    with pytest.raises(InvalidRequest, match="continues a message") as caught:
        grammar(response_format=JSON_SCHEMA, start="content_continuation")
    assert caught.value.param == "response_format"
