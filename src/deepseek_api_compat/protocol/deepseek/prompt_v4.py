"""Prompts of DeepSeek V4 and V4.1, by DeepSeek's own package `deepseek-recipe`.

Thinking is on unless the request says otherwise, and what the recipe refuses is refused here too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import ChatRequest, Message, text_of
from deepseek_api_compat.protocol.segment import Segment

_MODELS = {"v4": "DeepSeek-V4-Pro", "v4.1": "DeepSeek-V4.1-Flash"}  # the recipe's names
_FIELDS = ("tool_choice", "response_format", "reasoning_effort")


def render(format: str, request: ChatRequest) -> list[Segment]:
    """`format` is v4 or v4.1. Raises InvalidRequest, also when the package is missing."""
    try:
        import deepseek_recipe as recipe
    except ImportError:
        raise InvalidRequest(
            f"The format {format} needs the package deepseek-recipe; "
            "install with: pip install 'deepseek-api-compat[formats]'."
        ) from None
    try:
        # As JSON, because the recipe refuses integers of more than 64 bits in Python objects.
        body = msgspec.json.encode(_body(format, request))
        converted = recipe.ChatCompletionRequest(body).convert(recipe.ConversionOptions())
    except (recipe.ConversionError, ValueError) as error:
        raise InvalidRequest(f"DeepSeek's {format.upper()} format: {error}") from None
    encoding = recipe.DeepseekV4Encoding() if format == "v4" else recipe.DeepseekV41Encoding()
    prompt = encoding.render_conversation(converted.conversation)
    return list(_segments(prompt.prompt, prompt.special_ranges))


def _segments(prompt: str, special: list[tuple[int, int]]) -> Iterator[Segment]:
    at = 0
    for start, end in special:
        if at < start:
            yield Segment(prompt[at:start], False)
        yield Segment(prompt[start:end], True)
        at = end
    if at < len(prompt):
        yield Segment(prompt[at:], False)


def _body(format: str, request: ChatRequest) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": _MODELS[format],
        "messages": [_message(i, message) for i, message in enumerate(request.messages)],
    }
    if request.tools:
        body["tools"] = msgspec.to_builtins(request.tools)
    if request.thinks is not None:
        body["thinking"] = {"type": "enabled" if request.thinks else "disabled"}
    for name in _FIELDS:
        if (value := getattr(request, name)) is not None:
            body[name] = msgspec.to_builtins(value)
    return body


def _message(i: int, message: Message) -> dict[str, Any]:
    # The recipe doesn't know the role `developer`, OpenAI's newer name of `system`.
    body: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": _content(message, f"messages[{i}].content"),
    }
    for name in ("tool_call_id", "reasoning_content", "prefix", "name"):
        if (value := getattr(message, name)) is not None:
            body[name] = value
    if message.tool_calls:
        body["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": call.function.arguments},
            }
            for call in message.tool_calls
        ]
    return body


def _content(message: Message, param: str) -> str | list[dict[str, str]] | None:
    if not isinstance(message.content, list):
        return message.content
    # Parts stay parts: the recipe puts an empty line between them.
    return [{"type": "text", "text": text_of([part], param)} for part in message.content]
