"""The account of one request: reserved before it is dispatched, kept while it runs, settled at its end.

    account = books.account(call_id, endpoint, principal, grant, tally)
    await account.reserve(pool, prompt, limit)    tokens and money of its key and its model
    await account.dispatch(replica)               it is written down; now an engine may hear of it
    account.progress(); account.writing()         what was made so far; all of it is being sent
    account.settle(...)                           once, whatever the end

A request that was refused costs nothing; of a known key it is counted. Everything else leaves one row in the
ledger, with what was really used.
"""

from __future__ import annotations

import time

from deepseek_api_compat.errors import (
    ApiError,
    EngineFailed,
    EngineUnavailable,
    InsufficientQuota,
    LedgerUnavailable,
    PermissionDenied,
    RateLimited,
)
from deepseek_api_compat.gateway.intake_state import IntakeState
from deepseek_api_compat.gateway.journal import Entry, Journal
from deepseek_api_compat.gateway.limits import Grant, Limiter, OverLimit
from deepseek_api_compat.gateway.metrics import UNRECORDED, Tally
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.prices import FREE, Price, Prices
from deepseek_api_compat.gateway.response import Headers, rate_headers
from deepseek_api_compat.security.keys import Principal
from deepseek_api_compat.store.ledger_rows import Outcome

REFUSALS = frozenset({400, 401, 402, 403, 404, 413, 422, 429})
LOST = (EngineFailed, EngineUnavailable)
# Refused by a limit, not for what they are.
FREE_OF_CHARGE = (RateLimited, InsufficientQuota, LedgerUnavailable)
OFTEN = 64  # tokens after which the limits hear how many there are


class Books:
    """What accounts are kept with; one for each worker. `intake` is what the supervisor said last."""

    def __init__(self, limiter: Limiter, journal: Journal, prices: Prices) -> None:
        self.limiter = limiter
        self.journal = journal
        self.prices = prices
        self.intake = IntakeState()

    @property
    def problem(self) -> str | None:
        """What keeps requests from being written down, or from getting into the ledger; None: nothing."""
        return self.journal.problem or self.intake.problem

    @property
    def refuses(self) -> bool:
        """Are requests refused because they can't be written down?"""
        return self.journal.refuses


class Account:
    """One request's account. Failure policy: `reserve` and `dispatch` raise ApiError; the rest never does."""

    __slots__ = (
        "_books",
        "_checked",
        "_entry",
        "_headers",
        "_price",
        "_reserved",
        "_sent",
        "grant",
        "id",
        "principal",
        "tally",
    )

    def __init__(
        self, books: Books, id: str, principal: Principal, grant: Grant, tally: Tally, headers: Headers
    ) -> None:
        """`id` is the request's, unique for ever; `headers` are the answer's, which tell what is left."""
        self._books = books
        self._headers = headers
        self.id = id
        self.principal = principal
        self.grant = grant
        self.tally = tally
        self._price: Price = FREE
        self._entry: Entry | None = None
        self._reserved = False
        self._sent = self._checked = 0

    def limit(self, wanted: int | None) -> int | None:
        """Most tokens of each answer: what was asked for, as far as a temporary token allows it."""
        cap = self.principal.max_tokens
        return wanted if cap is None else cap if wanted is None else min(wanted, cap)

    async def reserve(self, pool: ModelPool, prompt: int, limit: int | None, answers: int = 1) -> None:
        """Reserve what `answers` answers of up to `limit` tokens to a prompt of so many tokens may use.

        Raises what the limits raise; then it has cost nothing.
        """
        self._price = price = self._books.prices.find(pool.name)
        grant = self.grant
        if grant.reserves(pool.index):
            answer = self._books.limiter.estimate(self.principal, pool.index, prompt, limit) * answers
            try:
                await grant.reserve(pool.index, prompt + answer, price.of(prompt, 0, answer))
            except OverLimit as error:
                self._headers += rate_headers(None, error.tokens)
                raise
            self._headers += rate_headers(None, grant.tokens)
        self._reserved = True

    async def dispatch(self, replica: int) -> None:
        """Write down that replica number `replica` is about to work for it. Raises LedgerUnavailable."""
        if self._entry is not None:  # another of its choices
            return
        now = time.monotonic()
        entry = self._admit(now)
        entry.dispatched(replica, int((now - self.tally.start) * 1000))
        if self._books.journal.waits:
            await self._books.journal.synced()

    def progress(self) -> None:
        """What was made so far counts, whatever happens now."""
        entry, tally = self._entry, self.tally
        if entry is None:
            return
        _note(entry, tally)
        if tally.completion_tokens >= self._checked + OFTEN:
            self._checked = tally.completion_tokens
            self.grant.use(*self._used())

    def writing(self) -> None:
        """All that was made so far is about to be written to the client, in the very next step.

        Before the write, not after it: whenever this process dies, nobody has received what is not counted.
        """
        if self._entry is not None:
            self._entry.sent(self.tally.completion_tokens - self._sent)
            self._sent = self.tally.completion_tokens

    def settle(self, *, cancelled: str | None = None) -> None:
        """The end. `cancelled`: "client" or "shutdown", if that is what ended it.

        The status and the error are the tally's.
        """
        tally = self.tally
        entry, self._entry = self._entry, None
        if entry is None and (not self._reserved or tally.status in REFUSALS or _is_refusal(tally.error)):
            self._refused()
            return
        now = time.monotonic()
        entry = entry or self._late(now)
        if entry is None:
            self.grant.give_back()
            return
        self._entry = None
        _note(entry, tally)
        error = tally.error
        price = entry.settle(
            outcome_of(tally, cancelled),
            tally.status,
            int((now - tally.start) * 1000),
            error_code=None if error is None else error.code or error.type,
            finish=tally.finish,
        )
        self.grant.settle(tally.prompt_tokens + tally.completion_tokens, price)

    def _refused(self) -> None:
        error = self.tally.error
        if isinstance(error, FREE_OF_CHARGE):
            self.grant.give_back()
        else:
            self.grant.settle(0, 0)  # it was a request all the same: a wrong one, or a list of models
        if error is not None:
            self._books.journal.refused(self.principal.id, error.code or error.type)

    def _late(self, now: float) -> Entry | None:
        """Of a request that ended before an engine heard of it, as of a client that left the queue."""
        try:
            return self._admit(now)
        except LedgerUnavailable:
            return None

    def _admit(self, now: float) -> Entry:
        tally, principal = self.tally, self.principal
        age = now - tally.start
        journal = self._books.journal
        unrecorded = journal.unrecorded
        self._entry = journal.admit(
            self.id,
            int((time.time() - age) * 1000),
            principal.id,
            principal.token_id,
            tally.endpoint,
            tally.model,
            self._price,
        )
        if journal.unrecorded != unrecorded:
            UNRECORDED.inc()
        return self._entry

    def _used(self) -> tuple[int, int]:
        tally = self.tally
        tokens = tally.prompt_tokens + tally.completion_tokens
        return tokens, self._price.of(tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens)


def _note(entry: Entry, tally: Tally) -> None:
    if tally.first:
        entry.first_token(int((tally.first - tally.start) * 1000))
    entry.made(tally.prompt_tokens, tally.cached_tokens, tally.completion_tokens, tally.reasoning_tokens)


def may_use(principal: Principal, pool: ModelPool) -> bool:
    """Whether the key, or its token, may use a model under any of its names."""
    allowed = principal.models
    return allowed is None or not allowed.isdisjoint(pool.names)


def check_model(principal: Principal, pool: ModelPool) -> None:
    """Raises PermissionDenied for a model that the key, or its token, may not use."""
    if not may_use(principal, pool):
        message = f"This key may not use the model {pool.name}."
        raise PermissionDenied(message, param="model", code="model_not_allowed")


def outcome_of(tally: Tally, cancelled: str | None) -> Outcome:
    """How a request ended. `cancelled`: "client" or "shutdown", if that is what ended it."""
    if cancelled is not None:
        return "cancelled_by_client" if cancelled == "client" else "cancelled_by_shutdown"
    if tally.error is None and tally.status < 400:
        return "ok"
    return "engine_lost" if isinstance(tally.error, LOST) else "error"


def _is_refusal(error: ApiError | None) -> bool:
    return error is not None and error.status in REFUSALS
