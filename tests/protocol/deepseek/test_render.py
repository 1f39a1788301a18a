from __future__ import annotations

import json
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.deepseek import FORMATS, render
from deepseek_api_compat.protocol.openai import ChatRequest, CompletionRequest, DecodeLimits, decode_chat

TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "properties": {}}}}


def request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": messages or [{"role": "user", "content": "Hi"}], **fields}
    return decode_chat(json.dumps(body).encode(), DecodeLimits())


def text(format: str, request: ChatRequest, variant: str | None = None) -> str:
    return "".join(segment.text for segment in render(format, variant, request))


# A model that has seen one text must not meet another after an update: change this knowingly or not at all.
V3_TOOLS = """<｜begin▁of▁sentence｜>Be brief.

## Tools

You can call these functions, described in JSON Schema:

{"name": "now", "parameters": {"type": "object", "properties": {}}}
{"name": "now", "parameters": {"type": "object", "properties": {}}}

To call functions, end your reply with one block in exactly this format, where ARGUMENTS is a JSON object:
<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME
```json
ARGUMENTS
```<｜tool▁call▁end｜>
<｜tool▁call▁begin｜>function<｜tool▁sep｜>FUNCTION_NAME
```json
ARGUMENTS
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

The block has one entry for each call. Its results come next. Without a need for a function, just answer.\
<｜User｜>What time is it?<｜Assistant｜>"""


def test_v3_tool_text_is_stable() -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What time is it?"}]
    assert text("v3-tools", request(*messages, tools=[TOOL, TOOL])) == V3_TOOLS


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "v3"])
def test_tool_choice_none_hides_the_tools(format: str) -> None:
    assert '"properties"' in text(format, request(tools=[TOOL]))
    assert text(format, request(tools=[TOOL], tool_choice="none")) == text(format, request())


@pytest.mark.parametrize(
    ("fields", "thinks"),
    [
        ({}, False),
        ({"thinking": True}, True),
        ({"thinking": {"type": "enabled"}}, True),
        ({"chat_template_kwargs": {"thinking": True}}, True),
        ({"chat_template_kwargs": {"enable_thinking": True}}, True),
        ({"reasoning_effort": "high"}, True),
        ({"reasoning_effort": "none"}, False),
        ({"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "high"}, False),
        ({"thinking": False, "chat_template_kwargs": {"thinking": True}}, False),
    ],
)
@pytest.mark.parametrize("format", ["v3.1", "v3.2"])
def test_thinking_is_chosen_by_the_request(format: str, fields: dict[str, Any], thinks: bool) -> None:
    end = "<think>" if thinks else "</think>"
    assert text(format, request(**fields)) == f"<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>{end}"


def test_v32_continues_a_given_answer_after_empty_reasoning() -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hel", "prefix": True}]
    assert text("v3.2", request(*messages, thinking=True)).endswith("<｜Assistant｜><think></think>Hel")


def test_v32_continues_given_reasoning() -> None:
    begun = {"role": "assistant", "content": None, "reasoning_content": "Hmm", "prefix": True}
    assert text("v3.2", request({"role": "user", "content": "Hi"}, begun, thinking=True)).endswith(
        "<think>Hmm"
    )


USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([{**USER, "prefix": True}], "messages[0].prefix"),
        ([USER, {**ANSWER, "prefix": True}, USER], "messages[1].prefix"),
        ([USER, {"role": "latest_reminder", "content": "x"}], "messages[1].role"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}],
            "messages[0].content",
        ),
    ],
)
@pytest.mark.parametrize("format", ["v3", "r1", "v3.1", "v3.2"])
def test_what_a_format_cannot_express_is_named(
    format: str, messages: list[dict[str, Any]], names: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(format, None, request(*messages))
    assert caught.value.param == names
    assert names in caught.value.message


@pytest.mark.parametrize(
    ("messages", "names"),
    [
        ([USER, {"role": "tool", "tool_call_id": "c", "content": "2"}], "messages[1]"),
        ([USER, ANSWER], "messages[1]"),
        ([{"role": "developer", "content": "x"}, ANSWER, USER], "messages[0]"),
    ],
)
def test_v32_names_the_message_that_it_refuses(messages: list[dict[str, Any]], names: str) -> None:
    with pytest.raises(InvalidRequest, match="DeepSeek-V3") as caught:
        render("v3.2", None, request(*messages, thinking=True))
    assert caught.value.param == names


def calling(arguments: str) -> ChatRequest:
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": arguments}}
    return request(USER, {"role": "assistant", "content": "", "tool_calls": [call]}, tools=[TOOL])


@pytest.mark.parametrize(
    "arguments", ["", "[1]", '{"a": ', '{"a": "\\ud800"}', '{"a":' * 5000 + "1" + "}" * 5000]
)
def test_arguments_that_are_no_object(arguments: str) -> None:
    for format in ("v3-tools", "r1", "v3.1"):
        assert arguments in text(format, calling(arguments))
    with pytest.raises(InvalidRequest) as caught:
        render("v3.2", None, calling(arguments))
    assert caught.value.param == "messages[1].tool_calls[0].function.arguments"


def messages_of(roles: list[str]) -> list[dict[str, Any]]:
    """One message for each role, numbered; `caller` is an assistant that calls two functions."""
    function = {"name": "now", "arguments": '{"a": 1}'}
    calls = [{"id": f"c{n}", "type": "function", "function": function} for n in range(2)]
    kinds: dict[str, dict[str, Any]] = {
        "caller": {"role": "assistant", "tool_calls": calls},
        "thinker": {"role": "assistant", "reasoning_content": "Hmm"},
        "tool": {"role": "tool", "tool_call_id": "c0"},
    }
    return [{"role": role, "content": f"text {i}!", **kinds.get(role, {})} for i, role in enumerate(roles)]


ROLES = ["system", "developer", "user", "assistant", "caller", "thinker", "tool", "tool"]


@pytest.mark.parametrize("format", FORMATS)
@given(
    roles=st.lists(st.sampled_from(ROLES), min_size=1, max_size=8),
    thinking=st.booleans(),
    tools=st.sampled_from([None, [TOOL]]),
)
@settings(max_examples=150, deadline=None)
def test_any_order_of_messages_is_rendered_whole_or_refused(
    format: str, roles: list[str], thinking: bool, tools: list[Any] | None
) -> None:
    messages = messages_of(roles)
    try:
        prompt = text(format, request(*messages, thinking=thinking, tools=tools))
    except InvalidRequest:
        assert format in ("v3.2", "v4", "v4.1")
    else:
        assert [message["content"] for message in messages if message["content"] not in prompt] == []


@pytest.mark.parametrize("format", FORMATS[-2:])
def test_v4_tools_may_have_large_numbers(format: str) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 10**30}}}
    tool = {"type": "function", "function": {"name": "count", "parameters": schema}}
    assert '"maximum": 1e+30' in text(format, request(tools=[tool]))


def test_v4_says_what_it_refuses() -> None:
    with pytest.raises(InvalidRequest, match=r"V4 format: .*`weird`") as caught:
        render("v4", None, request(reasoning_effort="weird"))
    assert caught.value.param is None


def test_v4_says_which_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepseek_recipe", None)
    with pytest.raises(InvalidRequest, match="v4 needs the package deepseek-recipe"):
        render("v4", None, request())


@pytest.mark.parametrize(
    ("format", "variant", "param"), [("v5", None, "format"), ("v3", "x", "variant"), ("v4", "x", "variant")]
)
def test_unknown_formats_are_refused(format: str, variant: str | None, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        render(format, variant, request())
    assert caught.value.param == param


def test_a_gap_needs_a_suffix() -> None:
    with pytest.raises(InvalidRequest, match="suffix"):
        render("v3", None, CompletionRequest(model="m", prompt="def f("))
