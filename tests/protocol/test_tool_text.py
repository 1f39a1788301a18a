"""Tools, calls and results as plain text."""

import json
from typing import Any

import pytest

from deepseek_api_compat.protocol.openai import ChatRequest, DecodeLimits, decode_chat
from deepseek_api_compat.protocol.prompt import normalise
from deepseek_api_compat.protocol.tool_text import native_tools, tool_text, with_tool_text

WEATHER = {
    "name": "get_weather",
    "description": "Weather of a city, in °C",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": True,
}
TIME = {"name": "get_time"}
TEXT = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{"name": "get_weather", "description": "Weather of a city, in °C", "parameters": {"type": "object", \
"properties": {"city": {"type": "string"}}}}
{"name": "get_time"}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
USER = {"role": "user", "content": "Hi"}


def request(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [USER], **fields}
    return decode_chat(json.dumps(body).encode(), DecodeLimits())


def written(messages: list[dict[str, Any]], *functions: dict[str, Any]) -> list[dict[str, Any]]:
    decoded = request(messages=messages)
    return with_tool_text(normalise(decoded.messages), functions, decoded)


def call(id: str, name: str, arguments: str) -> dict[str, Any]:
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


@pytest.mark.parametrize(
    ("fields", "duty"),
    [
        ({}, ""),
        ({"tool_choice": "required"}, "\nNow you must call a function."),
        (
            {"tool_choice": {"type": "function", "function": {"name": "get_time"}}},
            "\nNow you must call the function get_time.",
        ),
        ({"parallel_tool_calls": False}, "\nCall only one function at a time."),
        (
            {"parallel_tool_calls": False, "tool_choice": "required"},
            "\nNow you must call a function.\nCall only one function at a time.",
        ),
    ],
)
def test_what_a_model_is_told(fields: dict[str, Any], duty: str) -> None:
    assert tool_text([WEATHER, TIME], request(**fields)) == TEXT + duty


def test_the_text_ends_the_first_system_message() -> None:
    system = {"role": "system", "content": "Be brief."}
    text = tool_text([TIME], request())
    assert written([USER, system, system], TIME) == [
        USER,
        {"role": "system", "content": f"Be brief.\n\n{text}"},
        system,
    ]
    assert written([USER], TIME) == [{"role": "system", "content": text}, USER]
    assert written([{"role": "system", "content": ""}, USER], TIME)[0]["content"] == text
    assert written([system, USER]) == [system, USER]


def test_calls_and_results_of_the_history() -> None:
    calls = [call("a", "f", '{"x":[1, "é"]}'), call("b", "g", "")]
    assert written(
        [
            USER,
            {"role": "assistant", "content": "Let me see.", "tool_calls": calls, "reasoning_content": "hm"},
            {"role": "tool", "content": "7", "tool_call_id": "a"},
            {"role": "tool", "content": "8\n", "tool_call_id": "b"},
            {"role": "assistant", "content": None, "tool_calls": [call("c", "f", "{broken")]},
            {"role": "tool", "content": "9", "tool_call_id": "c"},
            USER,
        ]
    ) == [
        USER,
        {
            "role": "assistant",
            "reasoning_content": "hm",
            "content": "Let me see.\n"
            '<tool_call>\n{"name": "f", "arguments": {"x":[1, "é"]}}\n</tool_call>\n'
            '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
        },
        {
            "role": "user",
            "content": "<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n\n</tool_response>",
        },
        {
            "role": "assistant",
            "content": '<tool_call>\n{"name": "f", "arguments": "{broken"}\n</tool_call>',
        },
        {"role": "user", "content": "<tool_response>\n9\n</tool_response>"},
        USER,
    ]


HERMES = r"""{%- if tools %}{{- "<tools>" }}{%- for tool in tools %}{{ tool | tojson }}{%- endfor %}\
{{- "</tools>\n<tool_call>\n{\"name\": <function-name>, \"arguments\": <args>}\n</tool_call>" }}{% endif %}\
{%- for message in messages %}{% if message.role == "tool" %}{{ message.content }}{% endif %}{% endfor %}"""


@pytest.mark.parametrize(
    ("template", "native"),
    [
        (HERMES, True),
        ("{% if tools %}{% endif %}{{ 'tool' }}<tool_call>\n{'name': <name>}", True),
        ("{% for message in messages %}{{ message.content }}{% endfor %}", False),
        # Other forms than ours: those of GLM-4.5 and Qwen3-Coder, DeepSeek-R1's distillations, Llama 3.1.
        ("{% if tools %}{% endif %}{{ 'tool' }}<tool_call>NAME\n<arg_key>KEY</arg_key>", False),
        ("{% if tools %}{% endif %}{{ 'tool' }}<tool_call>\n<function=NAME>", False),
        ("{% if tools %}{% endif %}{{ 'tool' }}<｜tool▁calls▁begin｜>", False),
        ("{% if tools %}{% endif %}{{ 'tool' }}{'{\"name\": '", False),
    ],
)
def test_templates_that_know_the_form_themselves(template: str, native: bool) -> None:
    assert native_tools(template) is native
