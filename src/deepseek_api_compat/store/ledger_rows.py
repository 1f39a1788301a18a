"""What the ledger is told and tells, as plain types: workers use them, and never open its database."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

HOUR = 3600
DAY = 24 * HOUR

Outcome = Literal[
    "ok", "error", "cancelled_by_client", "cancelled_by_shutdown", "engine_lost", "gateway_lost"
]
Grouping = Literal["key", "model", "hour", "day"]


class LedgerRow(msgspec.Struct, frozen=True, array_like=True, tag="row"):
    """One admitted request.

    `started` is in unix milliseconds, the other times in milliseconds since then (None: it never came to
    that). `status` is the HTTP status, None when the gateway died before it was known. `completion_tokens`
    is what is charged, `sent_tokens` what was written to the client's connection. `cached_tokens` are part
    of `prompt_tokens`, `reasoning_tokens` of `completion_tokens`. `finish` is that of choice 0.
    """

    request_id: str
    started: int
    key_id: str
    token_id: str | None
    endpoint: str
    model: str
    replica: int | None
    status: int | None
    outcome: str
    error_code: str | None
    finish: str | None
    queue_ms: int | None
    ttft_ms: int | None
    total_ms: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    sent_tokens: int
    price: int


class Refusals(msgspec.Struct, frozen=True, array_like=True, tag="refused"):
    """How often one journal saw a key refused for one cause in a minute (unix seconds // 60), so far."""

    minute: int
    key_id: str
    code: str
    count: int


class Batch(NamedTuple):
    """What bytes `begin` to `end` of a journal's file hold. `journal` is the name all its files share."""

    journal: str
    file: str
    begin: int
    end: int
    rows: Sequence[LedgerRow]
    refusals: Sequence[Refusals]


class Usage(msgspec.Struct, kw_only=True):
    """Sums over a group of requests. What the group is not formed by is None; `start` is in unix seconds."""

    key_id: str | None = None
    model: str | None = None
    start: int | None = None
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    price: int = 0
    outcomes: dict[str, int] = {}


class Spent(NamedTuple):
    """What a key, or a model, has used: money in all (micro-units), all tokens of this UTC day."""

    price: int
    tokens_today: int


class Filter(msgspec.Struct, frozen=True, kw_only=True):
    """Which rows: `since` <= started < `until`, in unix seconds; None: any."""

    since: float | None = None
    until: float | None = None
    key_id: str | None = None
    model: str | None = None
    outcome: str | None = None
