"""The replicas behind one model name: what this worker knows of them, and how a job gets to one."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec

from deepseek_api_compat.config import ModelSettings
from deepseek_api_compat.engines import kinds
from deepseek_api_compat.engines.base import EngineState, ModelInfo, TokenEngine
from deepseek_api_compat.engines.upstream import Hung, Lost, Upstream
from deepseek_api_compat.errors import (
    ApiError,
    EngineFailed,
    EngineTimeout,
    EngineUnavailable,
    InvalidRequest,
)
from deepseek_api_compat.gateway.balance import Balance, Visit
from deepseek_api_compat.gateway.breaker import Breaker, blames_replica, is_gone
from deepseek_api_compat.gateway.kv_feeds import Feeds
from deepseek_api_compat.gateway.slots import Lease, Leases
from deepseek_api_compat.protocol.continuation import Continuation
from deepseek_api_compat.protocol.job import Job, Piece

T = TypeVar("T")
CHAT_KINDS = frozenset({"openai"})
# A job that has met so many failures without a token in between may be their cause.
MOST_FAILURES = 3
# A replica that has failed so many jobs and completed none is asked for a token.
BARREN = 5
Doubt = Callable[[int, int, bool], None]


class ModelPool:
    """One configured model. `kind` is "token" or "chat"; a model has engines of one of them.

    Failure policy: a job whose engine dies, hangs or breaks its protocol goes to another replica, or to that
    one when it is back: from its start, or behind the ids that were passed on. It waits as long as
    `ready_timeout` says for a replica to be ready, then EngineUnavailable. A job that meets `MOST_FAILURES`
    in a row, with no token in between, ends with the engine's error.
    """

    def __init__(
        self,
        index: int,
        settings: ModelSettings,
        leases: Leases,
        *,
        on_doubt: Doubt = lambda pool, replica, hung: None,
    ) -> None:
        """`on_doubt(pool, replica, hung)` is told of a replica that should be looked after."""
        self.index = index
        self.settings = settings
        self.name = settings.name
        self.names = (settings.name, *settings.aliases)
        self.kind = "chat" if settings.engines[0].kind in CHAT_KINDS else "token"
        # No cap on a chat upstream unless one is configured, so no slot is leased for it either.
        self.leased = self.kind == "token" or any(engine.concurrency for engine in settings.engines)
        self._leases = leases
        self._ready_timeout = settings.ready_timeout
        self._on_doubt = on_doubt
        self._states: dict[int, EngineState] = {}
        self._engines: dict[int, TokenEngine] = {}
        self._upstreams: dict[int, Upstream] = {}
        # Of each replica, by its number: those of the first engine, then those of the next.
        self._configs = [engine for engine in settings.engines for _ in range(engine.replicas)]
        several = len(self._configs) > 1
        self._balance = Balance(settings) if several and self.kind == "token" else None
        self._feeds = Feeds(self._balance) if self._balance is not None else None
        self._waiters: set[asyncio.Future[None]] = set()
        self._breakers: defaultdict[int, Breaker] = defaultdict(Breaker)  # of chat upstreams
        self._failed: Counter[int] = Counter()  # jobs since one was completed, by replica
        self._bound: Counter[int] = Counter()  # answers under a grammar, by replica
        self._turn = 0

    def update(self, states: list[EngineState]) -> list[TokenEngine | Upstream]:
        """Take over the supervisor's view; returns the clients that are no longer needed."""
        old = self._states
        self._states = {state.replica: state for state in states}
        dropped: list[TokenEngine | Upstream] = []
        move = self.ready
        for replica, state in old.items():
            now = self._states.get(replica)
            # The answers of a client that is closed go on elsewhere. Those under a grammar may stay to their
            # end, for not every grammar's rest can be told.
            drained = move and now is not None and now.state == "drained" and not self._bound[replica]
            if now is None or drained or (now.endpoint, now.info) != (state.endpoint, state.info):
                if (engine := self._engines.pop(replica, None)) is not None:
                    dropped.append(engine)
                if not drained and (upstream := self._upstreams.pop(replica, None)) is not None:
                    dropped.append(upstream)  # its answers can't go on elsewhere
        if self._balance is not None and self._feeds is not None:
            self._balance.update(states)
            self._feeds.update(states)
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        return dropped

    async def close(self) -> None:
        """Read nothing more of what engines tell."""
        if self._feeds is not None:
            await self._feeds.close()

    def tells(self, replica: int) -> bool:
        """Whether the engine tells what it holds in its KV cache, without a gap so far."""
        return self._balance is not None and self._balance.told(replica)

    @property
    def ready(self) -> bool:
        return any(state.state == "ready" for state in self._states.values())

    @property
    def begins(self) -> bool:
        """Whether a request would begin now or soon: some replica is ready, and the queue is not full."""
        return self.ready and not (self.leased and self._leases.full(self.index))

    @property
    def states(self) -> list[EngineState]:
        return list(self._states.values())

    async def info(self) -> ModelInfo:
        """What a ready replica said of the model. Waits for one; raises EngineUnavailable."""
        state = await self.any_ready()
        assert state.info is not None, "a ready token engine has told what it is"
        return state.info

    def format(self, info: ModelInfo) -> str:
        """How the model's prompts are written: what the configuration says, else the model's files."""
        return info.format if self.settings.format == "auto" else self.settings.format

    async def engine(self) -> TokenEngine:
        """A client of any ready replica, for calls that take no slot (tokenize)."""
        return self._engine((await self.any_ready()).replica)

    async def ask(self, question: Callable[[TokenEngine], Awaitable[T]]) -> T:
        """What a ready replica says to a question that takes no slot, such as the tokens of a prompt.

        If it dies or hangs over it, another is asked, or that one when it is back, as often as a stream that
        has begun would look for one. Raises the last one's error.
        """
        failures = 0
        while True:
            replica = (await self.any_ready()).replica
            try:
                return await question(self._engine(replica))
            except (EngineUnavailable, EngineTimeout, Lost) as error:
                failures += 1
                if self._states[replica].state == "ready":
                    self._suspect(replica, isinstance(error, (EngineTimeout, Hung)))
                if failures >= MOST_FAILURES:
                    raise

    async def upstream(self, avoid: Collection[int] = ()) -> tuple[EngineState, Upstream]:
        """A ready chat upstream, each in turn; one to `avoid` or that keeps failing if there is no other."""
        order = self.upstreams(avoid)
        if not order:
            await self.any_ready()
            order = self.upstreams(avoid) or self.upstreams(())
        state = self._states[order[0]]
        return state, self.upstream_of(state)

    def upstreams(self, avoid: Collection[int]) -> list[int]:
        """The ready chat upstreams that are not to be avoided, each first in turn; those that fail last."""
        found = self.others(avoid)
        if len(found) < 2:
            return found
        self._turn += 1
        turn = self._turn % len(found)
        now = time.monotonic()
        return sorted(
            found[turn:] + found[:turn], key=lambda replica: not self._breakers[replica].admits(now)
        )

    def admit(self, replica: int) -> int | None:
        """A request goes to this upstream; `told` wants to hear of it, with this pass."""
        return self._breakers[replica].admit(time.monotonic()) if len(self._states) > 1 else None

    def told(self, replica: int, admitted: int | None, error: BaseException | None) -> None:
        """How a request to an upstream ended; an `error` that is not the upstream's says nothing of it."""
        if admitted is None:
            return
        breaker = self._breakers[replica]
        if error is None:
            breaker.succeeded(admitted)
        elif isinstance(error, ApiError) and blames_replica(error):
            breaker.failed(admitted, time.monotonic(), gone=is_gone(error))
        else:
            breaker.dropped(admitted)

    def others(self, avoid: Collection[int]) -> list[int]:
        """The ready replicas that are not to be avoided."""
        states = self._states.values()
        return [state.replica for state in states if state.state == "ready" and state.replica not in avoid]

    @property
    def continues(self) -> bool:
        """Whether some upstream continues messages that end with a prefix of the answer."""
        return any(engine.prefix_continuation for engine in self.settings.engines)

    def not_continuing(self) -> set[int]:
        """The upstreams that don't."""
        return {replica for replica in self._states if not self._configs[replica].prefix_continuation}

    def upstream_of(self, state: EngineState) -> Upstream:
        client = self._upstreams.get(state.replica)
        if client is None:
            config = self._configs[state.replica]
            client = self._upstreams[state.replica] = Upstream(
                state.endpoint, connect_timeout=config.connect_timeout, read_timeout=config.read_timeout
            )
        return client

    def upstream_model(self, state: EngineState) -> str:
        """The model's name at that upstream."""
        return self._configs[state.replica].model or self.name

    def state_of(self, replica: int) -> EngineState:
        return self._states[replica]

    async def lease(
        self, key: int = 0, *, urgent: bool = False, order: Sequence[int] = (), home: int = -1
    ) -> Lease:
        """A slot of a ready replica, fairly among keys. `urgent`: before all who wait; `order`: whose first.

        Raises RateLimited, EngineUnavailable, EngineTimeout.
        """
        if not urgent:
            await self.any_ready()
            return await self._leases.acquire(self.index, key, order=order, home=home)
        # It takes its place before a replica is ready: those who queue would get the slots otherwise.
        acquiring = asyncio.ensure_future(self._leases.acquire(self.index, key, urgent=True, order=order))
        try:
            while not acquiring.done():
                await self.any_ready()
                await self._change(self._ready_timeout, acquiring)
            return acquiring.result()
        except BaseException:
            if not acquiring.cancel() and acquiring.exception() is None:
                acquiring.result().release()
            raise

    async def stream(
        self, job: Job, key: int = 0, on_lease: Callable[[int], Awaitable[None]] | None = None
    ) -> AsyncGenerator[list[Piece], None]:
        """Pieces of the answer, in the groups in which they arrived; the slot is free when this closes.

        `key` is whose slot it is, for fairness; `on_lease` is told the replica before it hears of the job.
        """
        answer = Continuation(job)
        failures = 0
        failed: set[int] = set()
        lost: ApiError | None = None
        while (last := answer.ended()) is None:
            rest, begun = answer.rest(), len(answer.ids)
            lease, visit = await self._place(rest, key, failed, urgent=answer.begun)
            controls = self._controls(lease.replica)
            if job.grammar is not None:
                self._bound[lease.replica] += 1
            try:
                if on_lease is not None:
                    await on_lease(lease.replica)
                async with aclosing(self._engine(lease.replica).stream(rest)) as pieces:
                    async for group in pieces:
                        if visit is not None and len(answer.ids) == begun:
                            visit.begun()
                        yield answer.take(group)
                self._failed.pop(lease.replica, None)
                if visit is not None:
                    visit.ended(job.prompt_ids + answer.ids, job.cache_salt, answer.cached)
                return
            except InvalidRequest:
                if lost is not None and answer.begun:
                    raise lost from None  # the client's request was valid: this engine can't make the rest
                raise
            except (EngineUnavailable, EngineFailed, EngineTimeout) as error:
                lost = error
                self._doubt(lease, error)
                failed.add(lease.replica)
                failures = failures + 1 if len(answer.ids) == begun else 1
                if failures >= MOST_FAILURES:
                    raise
                # Not on the event loop: the rest of a grammar can take a tenth of a second.
                if job.grammar is not None and not await asyncio.to_thread(answer.can_continue, controls):
                    raise
            finally:
                if job.grammar is not None:
                    self._bound[lease.replica] -= 1
                if visit is not None:
                    visit.close()
                lease.release()
        yield [last]

    async def _place(
        self, job: Job, key: int, failed: Collection[int], *, urgent: bool
    ) -> tuple[Lease, Visit | None]:
        """A slot for the job, of the best replica that has one; the visit if there are several replicas.

        Of those where the job has `failed` only if no other has one.
        """
        if self._balance is None:
            return await self.lease(key, urgent=urgent), None
        prompt = self._balance.prompt(job.prompt_ids, job.cache_salt)
        order, home = self._balance.order(prompt, self._leases.load(self.index))
        if failed:
            order, home = sorted(order, key=failed.__contains__), -1
        lease = await self.lease(key, urgent=urgent, order=order, home=home)
        return lease, self._balance.send(lease.replica, prompt)

    def _controls(self, replica: int) -> dict[str, int]:
        """The control tokens of its model."""
        info = self._states[replica].info
        return info.controls if info is not None else {}

    def _doubt(self, lease: Lease, error: ApiError) -> None:
        """What failed like this gets no more work until the supervisor has looked at it."""
        replica = lease.replica
        self._failed[replica] += 1
        # It may answer questions and still give no tokens: then only a token proves anything.
        barren = self._failed[replica] >= BARREN
        if isinstance(error, EngineFailed) and not isinstance(error, Lost) and not barren:
            return  # it has answered, if only that it failed: perhaps it was the request
        if self._leases.suspend(lease):
            self._suspect(replica, barren or isinstance(error, (EngineTimeout, Hung)))

    def _suspect(self, replica: int, hung: bool) -> None:
        # Until the supervisor's next word, which comes in any case.
        self._states[replica] = msgspec.structs.replace(self._states[replica], state="doubtful")
        self._on_doubt(self.index, replica, hung)

    def usage(self) -> tuple[int, int, int]:
        return self._leases.usage(self.index)

    def _engine(self, replica: int) -> TokenEngine:
        engine = self._engines.get(replica)
        if engine is None:
            config = self._configs[replica]
            engine = self._engines[replica] = kinds.client(config, self._states[replica])
        return engine

    async def any_ready(self) -> EngineState:
        """A ready replica, as soon as there is one. Raises EngineUnavailable if none can be expected."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._ready_timeout
        while True:
            for state in self._states.values():
                if state.state == "ready":
                    return state
            if self._states and all(state.state == "failed" for state in self._states.values()):
                raise EngineUnavailable(
                    f"The engine of {self.name} has failed and was given up.", retry_after=30
                )
            if loop.time() >= deadline:
                raise EngineUnavailable(
                    f"No engine of {self.name} is ready; it may be starting.", retry_after=5
                )
            await self._change(deadline - loop.time())

    async def _change(self, timeout: float, *others: asyncio.Future[Lease]) -> None:
        """Wait for the supervisor's next word, or one of the others, at most `timeout` seconds."""
        # Not asyncio.wait_for: before Python 3.12 it can swallow a cancellation.
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        try:
            first: list[asyncio.Future[Any]] = [waiter, *others]
            await asyncio.wait(first, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._waiters.discard(waiter)
