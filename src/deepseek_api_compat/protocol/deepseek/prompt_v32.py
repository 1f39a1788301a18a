"""Prompts of DeepSeek-V3.2: DeepSeek's encoder of December 2025 (`encoding_dsv32.py`).

Its DSML markers are ordinary text to this tokenizer, only their framing turns are control tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.deepseek import tools_text
from deepseek_api_compat.protocol.deepseek.conversation import Call, Conversation, Turn, to_json
from deepseek_api_compat.protocol.deepseek.segments import (
    ASSISTANT,
    BOS,
    EOS,
    THINK,
    THINK_END,
    USER,
    given,
    written,
)
from deepseek_api_compat.protocol.segment import Segment

_ASKING = ("user", "developer")


def v32(conversation: Conversation) -> Iterator[Segment]:
    """Thinking is off unless asked for; reasoning of the history counts from the last user turn on.

    Raises InvalidRequest for what the encoder refuses: a tool result without its call, arguments that are
    no JSON object, and when thinking: a developer turn before the last user turn, or an assistant turn
    after it without reasoning and calls.
    """
    turns = conversation.turns
    yield from written(BOS)
    first_system = next((i for i, turn in enumerate(turns) if turn.role == "system"), None)
    if first_system is None:
        yield from tools_text.v32(conversation.tools)
    thinks = bool(conversation.thinks)
    last_user = max((i for i, turn in enumerate(turns) if turn.role in _ASKING), default=-1)
    for i, turn in enumerate(turns):
        current = thinks and i >= last_user  # part of the turn that is being answered
        mark = THINK if current else THINK_END
        if turn.role == "system":
            yield given(turn.text)
            if i == first_system:
                yield from tools_text.v32(conversation.tools)
        elif turn.role in _ASKING:
            if thinks and turn.role == "developer" and i < last_user:
                raise _refused(turn, "a developer message can't come before the last user message")
            yield from _asking(turn, mark)
        elif turn.role == "tool":
            yield from _result(turns, i, mark)
        else:
            yield from _assistant(turn, current)


def _refused(turn: Turn, why: str) -> InvalidRequest:
    return InvalidRequest(f"`{turn.param}`: {why} in DeepSeek-V3.2's format.", param=turn.param)


def _asking(turn: Turn, mark: str) -> Iterator[Segment]:
    yield from written(USER)
    if turn.role == "developer":
        yield from written("\n\n# The user's message is: ")
    yield given(turn.text)
    yield from written(ASSISTANT + mark)


def _result(turns: Sequence[Turn], i: int, mark: str) -> Iterator[Segment]:
    asked = i - 1
    while asked >= 0 and turns[asked].role == "tool":
        asked -= 1
    nth, of = i - asked, len(turns[asked].calls) if asked >= 0 else 0
    if nth > of:
        raise _refused(turns[i], "a tool result needs a call in the assistant message before it")
    start = "\n\n<function_results>\n<result>" if nth == 1 else "\n<result>"
    yield from written(start)
    yield given(turns[i].text)
    yield from written("</result>")
    if nth == of:
        yield from written(f"\n</function_results>\n\n{mark}")


def _assistant(turn: Turn, thinks: bool) -> Iterator[Segment]:
    if thinks:
        if not (turn.reasoning or turn.calls or turn.prefix):
            raise _refused(turn, "thinking needs `reasoning_content` or `tool_calls` here")
        yield given(turn.reasoning)
        if turn.prefix and not turn.text:
            return  # the answer goes on inside the reasoning
        yield from written(THINK_END)
    yield given(turn.text)
    if turn.calls:
        yield from written("\n\n<｜DSML｜function_calls>\n")
        yield given("\n".join(map(_invoke, turn.calls)))
        yield from written("\n</｜DSML｜function_calls>")
    if not turn.prefix:
        yield from written(EOS)


def _invoke(call: Call) -> str:
    arguments = call.parsed()
    if arguments is None:
        raise InvalidRequest(f"`{call.param}` must be a JSON object.", param=call.param)
    parameters = "\n".join(
        f'<｜DSML｜parameter name="{name}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else to_json(value)}</｜DSML｜parameter>"
        for name, value in arguments.items()
    )
    return f'<｜DSML｜invoke name="{call.name}">\n{parameters}\n</｜DSML｜invoke>'
