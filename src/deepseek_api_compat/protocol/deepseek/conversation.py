"""A chat request in the shape that all of DeepSeek's formats start from."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import ChatRequest, Message, text_of


class Call(NamedTuple):
    """A call of the history. `arguments` is the text that the request has; `param` is its path there."""

    name: str
    arguments: str
    param: str

    def parsed(self) -> dict[str, Any] | None:
        """The arguments as an object; None where they aren't one (half a surrogate pair is no text)."""
        try:
            return msgspec.json.decode(self.arguments, type=dict[str, Any])
        except (msgspec.MsgspecError, RecursionError):
            return None


class Turn(NamedTuple):
    """One message; `prefix` where the answer continues it. `param` is its path in the request."""

    role: str
    text: str
    param: str
    reasoning: str = ""
    calls: tuple[Call, ...] = ()
    prefix: bool = False


class Conversation(NamedTuple):
    """`tools` are function objects as the request has them; `thinks` is None where it leaves that open."""

    turns: tuple[Turn, ...]
    tools: tuple[dict[str, Any], ...]
    thinks: bool | None

    def hoisted(self) -> tuple[str, tuple[Turn, ...]]:
        """System and developer texts, joined by an empty line, and the other turns."""
        system = [turn.text for turn in self.turns if turn.role in ("system", "developer")]
        rest = (turn for turn in self.turns if turn.role not in ("system", "developer"))
        return "\n\n".join(system), tuple(rest)

    @property
    def continues(self) -> bool:
        """Does the answer continue the last message?"""
        return self.turns[-1].prefix


def conversation(request: ChatRequest, functions: Sequence[dict[str, Any]] | None = None) -> Conversation:
    """Raises InvalidRequest for content that is not text, and for a `prefix` that can't be continued.

    `functions` are the declared functions as the client wrote them, with unknown fields and the order of
    keys; without it they are rebuilt from the request.
    """
    last = len(request.messages) - 1
    turns = tuple(_turn(i, message, i == last) for i, message in enumerate(request.messages))
    if functions is None:
        functions = [msgspec.to_builtins(tool.function) for tool in request.tools or ()]
    tools = () if request.tool_choice == "none" else tuple(functions)
    return Conversation(turns, tools, request.thinks)


def _turn(i: int, message: Message, is_last: bool) -> Turn:
    param = f"messages[{i}]"
    if message.role == "latest_reminder":
        raise InvalidRequest(
            f"`{param}.role`: only DeepSeek V4 knows `latest_reminder`.", param=f"{param}.role"
        )
    if message.prefix and not (is_last and message.role == "assistant" and not message.tool_calls):
        raise InvalidRequest(
            f"`{param}.prefix`: only a last assistant message without tool calls can be continued.",
            param=f"{param}.prefix",
        )
    calls = tuple(
        Call(call.function.name, call.function.arguments, f"{param}.tool_calls[{j}].function.arguments")
        for j, call in enumerate(message.tool_calls or ())
    )
    return Turn(
        message.role,
        text_of(message.content, f"{param}.content"),
        param,
        message.reasoning_content or "",
        calls if message.role == "assistant" else (),
        bool(message.prefix),
    )


def to_json(value: Any) -> str:
    """JSON as DeepSeek's models saw it in training: blanks after separators, nothing escaped to ASCII."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise InvalidRequest(
            "The arguments of a tool call are nested too deeply.", param="messages"
        ) from None
