"""A request that is sent again gets the answer that it had: `Idempotency-Key`.

A client that lost an answer on its way can't know whether it was made. It sends the request again under the
same key, and the gateway does not make another. The answers are in the supervisor's memory, as any worker may
get the second request: `Answers` is there, `Repeats` in the workers. Whole answers with status 200 are kept,
no streams: whoever leaves a stream ends it.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Literal

import msgspec

from deepseek_api_compat.errors import Conflict, InvalidRequest
from deepseek_api_compat.gateway.response import JSON, SSE, Headers, Responder
from deepseek_api_compat.security.keys import Principal

HEADER = b"idempotency-key"
REPLAYED = b"idempotent-replayed: true\r\n"
LONGEST_KEY = 255
KEPT_FOR = 3600.0  # seconds
MOST_KEPT = 64 * 1024 * 1024  # bytes of all answers
LARGEST = 1024 * 1024  # bytes of one


class Place(msgspec.Struct, frozen=True):
    """One request: `owner` says whose it is, `digest` what was asked under which path."""

    owner: str
    key: str
    digest: str


class Found(msgspec.Struct, frozen=True):
    """new: make the answer, and say so with `Answers.end`. busy: it is being made. other: the key was used
    for another request. kept: here it is."""

    what: Literal["new", "busy", "other", "kept"]
    answer: str = ""


class _Entry:
    __slots__ = ("answer", "digest", "until", "worker")

    def __init__(self, digest: str, worker: int) -> None:
        self.digest = digest
        self.worker = worker
        self.answer: str | None = None  # None: it is being made
        self.until = 0.0


class Answers:
    """What was answered under which key. For one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # kept ones in order of age
        self._size = 0

    def begin(self, place: Place, worker: int) -> Found:
        self._forget_old()
        entry = self._entries.get((place.owner, place.key))
        if entry is None:
            self._entries[place.owner, place.key] = _Entry(place.digest, worker)
            return Found("new")
        if entry.digest != place.digest:
            return Found("other")
        return Found("busy") if entry.answer is None else Found("kept", entry.answer)

    def end(self, place: Place, answer: str | None) -> None:
        """What has come of a new one; None: nothing to keep, so that it may be tried again."""
        entry = self._entries.pop((place.owner, place.key), None)
        if entry is None or answer is None or len(answer) > LARGEST:
            return
        entry.answer, entry.until = answer, self._clock() + KEPT_FOR
        self._entries[place.owner, place.key] = entry
        self._size += len(answer)
        self._forget_old()

    def left(self, worker: int) -> None:
        """A worker is gone, and with it what it was making."""
        gone = [at for at, entry in self._entries.items() if entry.answer is None and entry.worker == worker]
        for at in gone:
            del self._entries[at]

    def _forget_old(self) -> None:
        now = self._clock()
        gone = []
        for at, entry in self._entries.items():
            if entry.answer is None:
                continue
            if entry.until > now and self._size <= MOST_KEPT:
                break
            self._size -= len(entry.answer)
            gone.append(at)
        for at in gone:
            del self._entries[at]


class Recorder(Responder):
    """Has `keep` told of a whole JSON answer before its client has it; None: there was none."""

    __slots__ = ("_events", "_keep", "_told")

    def __init__(self, scope: Any, keep: Callable[[bytes | None], None]) -> None:
        super().__init__(scope)
        self._keep = keep
        self._told = False
        self._events = False

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        self._tell(body if status == 200 else None)
        await super().whole(status, headers, body)

    async def begin(self, status: int, headers: Headers, data: bytes) -> None:
        self._events = SSE in headers
        await super().begin(status, headers, data)

    async def end(self, data: bytes) -> None:
        # Blank lines went before it while it was being made; a late error is an error object.
        self._tell(None if self._events or data.startswith(b'{"error":') else data)
        await super().end(data)

    def close(self) -> None:
        """No answer has come, or will."""
        if not self._told:
            self._tell(None)

    def _tell(self, body: bytes | None) -> None:
        self._told = True
        self._keep(body)


class Repeats:
    """A worker's side.

    Failure policy: what can't be asked of the supervisor is refused (OperationFailed, 503), not made twice.
    """

    def __init__(
        self,
        begin: Callable[[Place], Awaitable[Found]],
        end: Callable[[Place, str | None], None],
    ) -> None:
        self._begin = begin
        self._end = end

    async def begin(
        self, principal: Principal, key: bytes, path: str, body: bytes
    ) -> tuple[Place, bytes | None]:
        """Where its answer goes, and the answer if there is one already. Raises InvalidRequest, Conflict."""
        try:
            name = key.decode("ascii")
        except UnicodeDecodeError:
            name = ""
        if not 0 < len(name) <= LONGEST_KEY or not name.isprintable():
            raise InvalidRequest(f"Idempotency-Key must have 1 to {LONGEST_KEY} printable ASCII characters.")
        place = Place(_owner(principal), name, hashlib.sha256(path.encode() + b"\n" + body).hexdigest())
        found = await self._begin(place)
        if found.what == "other":
            raise InvalidRequest(
                "This Idempotency-Key was used for another request.", code="idempotency_key_reused"
            )
        if found.what == "busy":
            raise Conflict("A request with this Idempotency-Key is being answered.", retry_after=1.0)
        return place, found.answer.encode() if found.what == "kept" else None

    def end(self, place: Place, answer: bytes | None) -> None:
        """What has come of it; None: nothing to keep."""
        text = None
        if answer is not None and len(answer) <= LARGEST:
            with suppress(UnicodeDecodeError):  # an upstream's own words
                text = answer.decode()
        self._end(place, text)


def _owner(principal: Principal) -> str:
    """A key, with what it may have: no answer goes to whom it would be refused now."""
    models = None if principal.models is None else sorted(principal.models)
    return f"{principal.id} {models} {principal.max_tokens}"


async def send_again(out: Responder, headers: Headers, answer: bytes) -> None:
    await out.whole(200, [*headers, REPLAYED, JSON], answer)
