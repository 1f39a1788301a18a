"""Prompts of DeepSeek-V3, V3-0324 and R1.

Sources: the chat templates that DeepSeek published with the three models; for R1 with tools, which its own
template doesn't render, vLLM's. Two things of those templates are not imitated: that of V3 and R1 forgets
the markers of every tool turn but the first, and vLLM's V3 tool template writes its own indentation.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from deepseek_api_compat.protocol.deepseek import tools_text
from deepseek_api_compat.protocol.deepseek.conversation import Call, Conversation, Turn, to_json
from deepseek_api_compat.protocol.deepseek.segments import (
    ASSISTANT,
    BOS,
    CALL_BEGIN,
    CALL_END,
    CALLS_BEGIN,
    CALLS_END,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    OUTPUT_BEGIN,
    OUTPUT_END,
    OUTPUTS_BEGIN,
    OUTPUTS_END,
    SEP,
    THINK,
    THINK_END,
    USER,
    given,
    written,
)
from deepseek_api_compat.protocol.segment import Segment


class _Layout(NamedTuple):
    user_opens_answer: bool = False  # the assistant token is written with the user's turn
    between_results: str = ""
    strips_thinking: bool = False  # of answers in the history
    parses_arguments: bool = False  # and writes them anew
    answer: str = ASSISTANT  # where the model goes on


_V3 = _Layout(strips_thinking=True)
_R1 = _V3._replace(answer=f"{ASSISTANT}{THINK}\n")
_0324 = _Layout(user_opens_answer=True, between_results="\n")
_TOOLS = _0324._replace(parses_arguments=True)


def v3(conversation: Conversation) -> Iterator[Segment]:
    """DeepSeek-V3 of December 2024. It has no tool text: declared tools are not rendered."""
    return _prompt(conversation, (), _V3)


def v3_0324(conversation: Conversation) -> Iterator[Segment]:
    """DeepSeek-V3-0324; declared tools are not rendered either."""
    return _prompt(conversation, (), _0324)


def v3_tools(conversation: Conversation) -> Iterator[Segment]:
    """Both with declared tools, which our own text describes."""
    return _prompt(conversation, tools_text.v3(conversation.tools), _TOOLS)


def r1(conversation: Conversation) -> Iterator[Segment]:
    """DeepSeek-R1. Without tools the answer begins inside the reasoning; with tools R1 opens it itself."""
    if conversation.tools:
        return _prompt(conversation, tools_text.r1(conversation.tools), _TOOLS)
    return r1_official(conversation)


def r1_official(conversation: Conversation) -> Iterator[Segment]:
    """DeepSeek-R1's own template, which has calls in the history but no declared tools."""
    return _prompt(conversation, (), _R1)


def fill_in_the_middle(prefix: str, suffix: str) -> list[Segment]:
    """The prompt for the text that belongs between `prefix` and `suffix` (DeepSeek-Coder's README)."""
    return [*written(FIM_BEGIN), given(prefix), *written(FIM_HOLE), given(suffix), *written(FIM_END)]


def _prompt(conversation: Conversation, tools: Iterable[Segment], layout: _Layout) -> Iterator[Segment]:
    system, turns = conversation.hoisted()
    yield from written(BOS)
    yield given(system)
    yield from tools
    before = ""  # the role of the turn before
    for turn in turns:
        if turn.role == "user":
            yield from _user(turn, layout)
        elif turn.role == "tool":
            yield from written(layout.between_results if before == "tool" else OUTPUTS_BEGIN)
            yield from _result(turn)
        else:
            yield from _assistant(turn, before, layout)
        before = turn.role
    if before == "tool":
        yield from written(OUTPUTS_END)
    elif not conversation.continues and not (before == "user" and layout.user_opens_answer):
        yield from written(layout.answer)


def _user(turn: Turn, layout: _Layout) -> Iterator[Segment]:
    yield from written(USER)
    yield given(turn.text)
    if layout.user_opens_answer:
        yield from written(ASSISTANT)


def _result(turn: Turn) -> Iterator[Segment]:
    yield from written(OUTPUT_BEGIN)
    yield given(turn.text)
    yield from written(OUTPUT_END)


def _assistant(turn: Turn, before: str, layout: _Layout) -> Iterator[Segment]:
    text = turn.text
    if before == "tool":  # the answer goes on right after the results
        yield from written(OUTPUTS_END)
    else:
        if not layout.user_opens_answer:
            yield from written(ASSISTANT)
        if layout.strips_thinking and not turn.calls:
            text = text.rpartition(THINK_END)[2]
    yield given(text)
    if turn.calls:
        yield from _calls(turn.calls, layout)
    if not turn.prefix:
        yield from written(EOS)


def _calls(calls: Sequence[Call], layout: _Layout) -> Iterator[Segment]:
    for i, call in enumerate(calls):
        yield from written(f"\n{CALL_BEGIN}function{SEP}" if i else f"{CALLS_BEGIN}{CALL_BEGIN}function{SEP}")
        yield given(f"{call.name}\n```json\n{_arguments(call, layout)}\n```")
        yield from written(CALL_END)
    yield from written(CALLS_END)


def _arguments(call: Call, layout: _Layout) -> str:
    parsed = call.parsed() if layout.parses_arguments else None
    return call.arguments if parsed is None else to_json(parsed)
