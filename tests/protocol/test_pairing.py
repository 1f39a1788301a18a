"""Results of tool calls, put in the order of the calls."""

from __future__ import annotations

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.openai import FunctionCall, Message, MessageToolCall
from deepseek_api_compat.protocol.pairing import paired


def calls(*ids: str) -> Message:
    made = [MessageToolCall(id=id, function=FunctionCall(name="f", arguments="{}")) for id in ids]
    return Message(role="assistant", tool_calls=made)


def result(id: str, text: str = "ok") -> Message:
    return Message(role="tool", tool_call_id=id, content=text)


USER = Message(role="user", content="Go.")


def test_results_come_in_the_order_of_the_calls() -> None:
    turns = [USER, calls("a", "b", "c"), result("c"), result("a"), result("b"), USER]
    assert paired(turns) == [USER, calls("a", "b", "c"), result("a"), result("b"), result("c"), USER]


def test_the_same_ids_in_a_later_turn_are_other_calls() -> None:
    turns = [USER, calls("a"), result("a", "1"), calls("a"), result("a", "2"), USER]
    assert paired(turns) == turns


@pytest.mark.parametrize(
    ("turns", "param", "words"),
    [
        ([USER, result("a")], "messages[1].tool_call_id", "no tool call"),
        ([USER, calls("a"), result("b")], "messages[2].tool_call_id", "'b'"),
        ([USER, calls("a"), result("a"), result("a")], "messages[3].tool_call_id", "already"),
        ([USER, calls("a", "b"), result("b")], "messages[1].tool_calls", "without a result: a"),
        ([USER, calls("a")], "messages[1].tool_calls", "without a result: a"),
        ([USER, calls("a"), USER, result("a")], "messages[1].tool_calls", "without a result: a"),
    ],
)
def test_what_does_not_pair_is_refused(turns: list[Message], param: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as caught:
        paired(turns)
    assert caught.value.param == param
