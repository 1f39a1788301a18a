"""Questions of a worker and their answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deepseek_api_compat.errors import (
    InvalidRequest,
    NoSuchThing,
    NotFound,
    OperationFailed,
    SetupError,
    WrongValue,
)
from deepseek_api_compat.gateway.channel import (
    MAX_OPEN,
    Answer,
    AnyMessage,
    Ask,
    Questions,
    answer_to,
    encode,
    messages,
)
from deepseek_api_compat.store.audit import Actor

BY = Actor("key", "adminadmin22", "req-1")


class Channel:
    """What was sent to the supervisor, which answers when the test says so."""

    def __init__(self, patience: float = 5.0) -> None:
        self.sent: list[Ask] = []
        self.questions = Questions(self._send, patience)

    def _send(self, message: AnyMessage) -> None:
        assert isinstance(message, Ask)
        self.sent.append(message)

    def ask(self, op: str, **params: Any) -> asyncio.Task[Any]:
        return asyncio.create_task(self.questions.ask(op, params, BY))


async def until_sent(channel: Channel, count: int) -> None:
    await asyncio.sleep(0)  # each task that was just made runs up to its answer
    assert len(channel.sent) == count


async def test_each_question_gets_its_own_answer() -> None:
    channel = Channel()
    first, second = channel.ask("keys.list"), channel.ask("keys.get", key="a")
    await until_sent(channel, 2)
    assert [(ask.op, ask.params, ask.actor) for ask in channel.sent] == [
        ("keys.list", {}, BY),
        ("keys.get", {"key": "a"}, BY),
    ]
    channel.questions.answered(Answer(channel.sent[1].id, result={"id": "a"}))
    channel.questions.answered(Answer(channel.sent[0].id, result=[]))
    assert (await first, await second) == ([], {"id": "a"})


@pytest.mark.parametrize(
    ("error", "raised", "status", "param"),
    [
        (WrongValue("Bad.", "limits.rps"), InvalidRequest, 400, "limits.rps"),
        (NoSuchThing("Gone."), NotFound, 404, None),
        (SetupError("The disk is full."), OperationFailed, 503, None),
    ],
)
async def test_why_it_was_not_done_becomes_the_right_status(
    error: SetupError, raised: type[Exception], status: int, param: str | None
) -> None:
    channel = Channel()
    asked = channel.ask("keys.create")
    await until_sent(channel, 1)
    channel.questions.answered(answer_to(channel.sent[0], error))
    with pytest.raises(raised) as caught:
        await asked
    refusal: Any = caught.value
    assert (refusal.message, refusal.status, refusal.param) == (str(error), status, param)


async def test_a_silent_supervisor_is_a_503_and_its_late_answer_does_no_harm() -> None:
    channel = Channel(patience=0.01)
    with pytest.raises(OperationFailed, match="gave no answer"):
        await channel.ask("keys.list")
    channel.questions.answered(Answer(channel.sent[0].id, result=[]))


async def test_too_many_questions_at_a_time_are_refused_and_those_that_are_given_up_free_their_place() -> (
    None
):
    channel = Channel()
    asked = [channel.ask("keys.list") for _ in range(MAX_OPEN)]
    await until_sent(channel, MAX_OPEN)
    with pytest.raises(OperationFailed, match="Too many"):
        await channel.ask("keys.list")
    asked[0].cancel()
    await asyncio.wait([asked[0]])
    another = channel.ask("keys.list")
    await until_sent(channel, MAX_OPEN + 1)
    for task in (*asked[1:], another):
        task.cancel()
    await asyncio.wait([*asked[1:], another])


async def test_questions_and_answers_survive_the_wire() -> None:
    ask = Ask(7, "keys.create", {"name": "小\n明", "limits": {"rps": 0.5}, "models": None}, BY)
    answers = [Answer(7, result=[{"a": 1}]), Answer(8, error="No.", kind="wrong", field="name")]
    reader = asyncio.StreamReader()
    for message in (ask, *answers):
        reader.feed_data(encode(message))
    reader.feed_eof()
    assert [message async for message in messages(reader)] == [ask, *answers]
