"""Tools for models whose own template has no words for them: the generic form, written into messages.

The form is that of Hermes and Qwen, which most models have seen: a call is

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>

and its result comes back in a user message, in `<tool_response>` tags. The text is stable, so that prompts
share prefixes; docs/formats.md shows it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from deepseek_api_compat.protocol.openai import ChatRequest, NamedToolChoice

ChatMessage = dict[str, Any]  # as a template gets it: role, content, tool_calls ...
Function = Mapping[str, Any]  # as the request has it: name, description, parameters

_CALL = re.compile(r"""<tool_call>(?:\\n|\s)*\{\s*\\?["'](?:name|arguments)""")
_TOOLS = re.compile(r"\btools\b")
_TOOL_ROLE = re.compile(r"""["']tool["']""")

# Qwen2.5's words, known to many models. The smallest ones copy a placeholder like NAME into their calls;
# those in angle brackets they fill in.
_START = """\
# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
"""
_END = """
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> \
XML tags:
<tool_call>
{"name": <function-name>, "arguments": <args-json-object>}
</tool_call>"""
_REQUIRED = "Now you must call a function."
_NAMED = "Now you must call the function {}."
_SINGLE = "Call only one function at a time."


def native_tools(template: str) -> bool:
    """Does the template itself show tools, calls in the generic form, and results? Then it is left to it."""
    return all(pattern.search(template) for pattern in (_CALL, _TOOLS, _TOOL_ROLE))


def with_tool_text(
    messages: Sequence[ChatMessage], functions: Sequence[Function], request: ChatRequest
) -> list[ChatMessage]:
    """The messages with everything about tools as plain text: functions, calls, and results.

    The text about `functions` (none: no text) ends the first system message, which is made if there is
    none. Of `request` only tool_choice and parallel_tool_calls count. Results must follow their calls in
    the calls' order.
    """
    written: list[ChatMessage] = []
    for at, message in enumerate(messages):
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if at and messages[at - 1]["role"] == "tool":
                written[-1] = {**written[-1], "content": f"{written[-1]['content']}\n{result}"}
            else:
                written.append({"role": "user", "content": result})
        else:
            written.append(_with_calls(message) if "tool_calls" in message else message)
    return _in_first_system(written, tool_text(functions, request)) if functions else written


def tool_text(functions: Sequence[Function], request: ChatRequest) -> str:
    """What a model is told about its functions: one a line, without `strict`, which is not for it."""
    shown = ({name: value for name, value in one.items() if name != "strict"} for one in functions)
    return _START + "\n".join(map(_json, shown)) + _END + "".join(f"\n{one}" for one in _duties(request))


def _duties(request: ChatRequest) -> Iterator[str]:
    choice = request.tool_choice
    if isinstance(choice, NamedToolChoice):
        yield _NAMED.format(choice.function.name)
    elif choice == "required":
        yield _REQUIRED
    if request.parallel_tool_calls is False:
        yield _SINGLE


def _with_calls(message: ChatMessage) -> ChatMessage:
    blocks = [_block(call["function"]) for call in message["tool_calls"]]
    content = "\n".join([message["content"], *blocks] if message["content"] else blocks)
    return {**{name: value for name, value in message.items() if name != "tool_calls"}, "content": content}


def _block(call: Mapping[str, str]) -> str:
    name, arguments = _json(call["name"]), _arguments(call["arguments"])
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _arguments(text: str) -> str:
    """The arguments of a call as they were written, so that the model finds its own words again."""
    try:
        msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError):
        return _json(text) if text else "{}"
    return text


def _in_first_system(messages: Sequence[ChatMessage], text: str) -> list[ChatMessage]:
    """The messages with `text` at the end of the first system message, after an empty line."""
    for at, message in enumerate(messages):
        if message["role"] == "system":
            content = f"{message['content']}\n\n{text}" if message["content"] else text
            return [*messages[:at], {**message, "content": content}, *messages[at + 1 :]]
    return [{"role": "system", "content": text}, *messages]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
