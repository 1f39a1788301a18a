"""Messages between the supervisor and its workers: one JSON object a line over a socket pair.

A worker starts with `Hello`, says `Started` when it accepts connections, and answers each `Keys`
with `Acknowledged`. What a worker can't do itself it asks for (`Questions`): each `Ask` gets one `Answer`.
When the other end closes, each side knows that its partner is dead.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Literal, Union

import msgspec

from deepseek_api_compat.config import Settings
from deepseek_api_compat.engines.base import EngineState
from deepseek_api_compat.errors import (
    ApiError,
    InvalidRequest,
    NoSuchThing,
    NotFound,
    OperationFailed,
    SetupError,
    WrongValue,
)
from deepseek_api_compat.gateway.idempotency import Found, Place
from deepseek_api_compat.gateway.intake_state import IntakeState
from deepseek_api_compat.store.audit import Actor
from deepseek_api_compat.store.base import KeyRecord

LIMIT = 64 * 1024 * 1024
PATIENCE = 10.0  # seconds that a question may take
MAX_OPEN = 64  # questions of one worker at a time


class Message(msgspec.Struct, frozen=True, tag=True):
    """Base of all messages; the tag is the class name."""


class Hello(Message, frozen=True):
    """All that a worker needs. `started`: Unix time of the start; `master`: the master key in hex."""

    worker: int
    started: int
    settings: Settings
    master: str
    version: int
    keys: Sequence[KeyRecord]
    engines: list[EngineState]


class Keys(Message, frozen=True):
    """The key table as it is now."""

    version: int
    keys: Sequence[KeyRecord]


class Engines(Message, frozen=True):
    """The state of all replicas as it is now."""

    engines: list[EngineState]


class Intake(Message, frozen=True):
    """How the ledger's intake is doing, whenever that changes."""

    state: IntakeState


class Certificate(Message, frozen=True):
    """Another certificate was published, for connections that begin now."""


class Drain(Message, frozen=True):
    """Finish the requests in flight, take no new ones, exit."""


class Doubt(Message, frozen=True):
    """A replica failed a request and may be dead, or hang (`hung`).

    It gets no more work until the supervisor says how it is.
    """

    pool: int
    replica: int
    hung: bool


class Started(Message, frozen=True):
    """The worker accepts connections."""


class Acknowledged(Message, frozen=True):
    """The worker uses key table `version`."""

    version: int


class Ask(Message, frozen=True):
    """Do `op` for `actor`, and answer. `params` are what `Operations.perform` takes for that op."""

    id: int
    op: str
    params: dict[str, Any]
    actor: Actor


class Begin(Message, frozen=True):
    """A request with an Idempotency-Key: is there an answer? The result of its `Answer` is a `Found`."""

    id: int
    place: Place


class End(Message, frozen=True):
    """What has come of a request that was `Begin`'s and new; None: nothing to keep."""

    place: Place
    answer: str | None


class Answer(Message, frozen=True):
    """The result of the `Ask` or `Begin` with this id, or why there is none.

    `error` is a sentence, None if all went well. `kind` says whose fault it is: "wrong", the asker's, in
    `field` if that is known; "missing", what was asked for is not there; "failed", ours.
    """

    id: int
    result: Any = None
    error: str | None = None
    kind: Literal["wrong", "missing", "failed"] = "failed"
    field: str | None = None


AnyMessage = Union[  # noqa: UP007 - evaluated on Python 3.10
    Hello, Keys, Engines, Intake, Certificate, Drain, Doubt, Started, Acknowledged, Ask, Begin, End, Answer
]

_encoder = msgspec.json.Encoder()
_decoder: msgspec.json.Decoder[AnyMessage] = msgspec.json.Decoder(AnyMessage)


def encode(message: AnyMessage) -> bytes:
    return _encoder.encode(message) + b"\n"


async def messages(reader: asyncio.StreamReader) -> AsyncIterator[AnyMessage]:
    """Messages until the other side closes or dies."""
    while True:
        try:
            line = await reader.readline()
        except ConnectionError:
            return
        if not line.endswith(b"\n"):
            return
        yield _decoder.decode(line)


class Questions:
    """What one worker asks the supervisor. For its event loop only.

    Failure policy: `ask` raises OperationFailed when the supervisor takes longer than `patience` seconds
    (what was asked for may still happen then), or when 64 questions are open already.
    """

    def __init__(self, send: Callable[[AnyMessage], None], patience: float = PATIENCE) -> None:
        self._send = send
        self._patience = patience
        self._open: dict[int, asyncio.Future[Answer]] = {}
        self._operations = 0  # of them
        self._ids = itertools.count(1)

    async def ask(self, op: str, params: dict[str, Any], actor: Actor) -> Any:
        """The result, plain data. Raises InvalidRequest, NotFound or OperationFailed."""
        if self._operations >= MAX_OPEN:
            raise OperationFailed("Too many operations at a time.", retry_after=1.0)
        self._operations += 1
        try:
            return await self._answer(lambda id: Ask(id, op, params, actor))
        finally:
            self._operations -= 1

    async def begin(self, place: Place) -> Found:
        """What the supervisor knows of a request with an Idempotency-Key. Raises OperationFailed."""
        return msgspec.convert(await self._answer(lambda id: Begin(id, place)), Found)

    def end(self, place: Place, answer: str | None) -> None:
        self._send(End(place, answer))

    async def _answer(self, question: Callable[[int], AnyMessage]) -> Any:
        id = next(self._ids)
        answered = self._open[id] = asyncio.get_running_loop().create_future()
        self._send(question(id))
        try:
            answer = await asyncio.wait_for(answered, self._patience)
        except asyncio.TimeoutError:
            problem = (
                f"The supervisor gave no answer in {self._patience:.0f} s; what was asked may be done yet."
            )
            raise OperationFailed(problem, retry_after=self._patience) from None
        finally:
            del self._open[id]
        if answer.error is not None:
            raise _refusal(answer, answer.error)
        return answer.result

    def answered(self, answer: Answer) -> None:
        """Give an answer to whoever still waits for it."""
        waiting = self._open.get(answer.id)
        if waiting is not None and not waiting.done():
            waiting.set_result(answer)


def _refusal(answer: Answer, sentence: str) -> ApiError:
    if answer.kind == "wrong":
        return InvalidRequest(sentence, param=answer.field)
    if answer.kind == "missing":
        return NotFound(sentence, code="not_found")
    return OperationFailed(sentence, retry_after=1.0)


def answer_to(ask: Ask, error: SetupError) -> Answer:
    """The answer that says why an operation was not done."""
    if isinstance(error, WrongValue):
        return Answer(ask.id, error=str(error), kind="wrong", field=error.field)
    return Answer(ask.id, error=str(error), kind="missing" if isinstance(error, NoSuchThing) else "failed")
