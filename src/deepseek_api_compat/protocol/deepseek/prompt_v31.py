"""Prompts of DeepSeek-V3.1 and V3.1-Terminus: the chat template and the model card's tool text."""

from __future__ import annotations

from collections.abc import Iterator

from deepseek_api_compat.protocol.deepseek import tools_text
from deepseek_api_compat.protocol.deepseek.conversation import Conversation, Turn
from deepseek_api_compat.protocol.deepseek.segments import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    OUTPUT_BEGIN,
    OUTPUT_END,
    SEP,
    THINK,
    THINK_END,
    USER,
    given,
    written,
)
from deepseek_api_compat.protocol.segment import Segment


def v31(conversation: Conversation) -> Iterator[Segment]:
    """Thinking is off unless asked for. After tool results, or a closed answer, the model goes on as is."""
    thinking = THINK if conversation.thinks else THINK_END
    system, turns = conversation.hoisted()
    yield from written(BOS)
    yield given(system)
    yield from tools_text.v31(conversation.tools)
    before = ""  # the role of the turn before
    for turn in turns:
        if turn.role == "user":
            yield from written(USER)
            yield given(turn.text)
        elif turn.role == "tool":
            yield from written(OUTPUT_BEGIN)
            yield given(turn.text)
            yield from written(OUTPUT_END)
        else:
            if before == "user":
                yield from written(ASSISTANT + (thinking if turn.prefix else THINK_END))
            yield from _assistant(turn, before)
        before = turn.role
    if before == "user":
        yield from written(ASSISTANT + thinking)


def _assistant(turn: Turn, before: str) -> Iterator[Segment]:
    text = turn.text
    if before != "tool" and not turn.calls and THINK_END in text:
        text = text.partition(THINK_END)[2]
    yield given(text)
    for i, call in enumerate(turn.calls):
        yield from written(CALL_BEGIN if i else CALLS_BEGIN + CALL_BEGIN)
        yield given(call.name)
        yield from written(SEP)
        yield given(call.arguments)
        yield from written(CALL_END)
    if turn.calls:
        yield from written(CALLS_END)
    if not turn.prefix:
        yield from written(EOS)
