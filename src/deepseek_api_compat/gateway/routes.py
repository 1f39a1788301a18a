"""Handlers of the API's routes. Each reads its body, decodes it, and answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from operator import methodcaller
from typing import Any, NamedTuple, Protocol

import msgspec

from deepseek_api_compat import __version__
from deepseek_api_compat.config import Settings
from deepseek_api_compat.errors import (
    ApiError,
    EngineUnavailable,
    InvalidRequest,
    LedgerUnavailable,
    ModelNotFound,
)
from deepseek_api_compat.gateway import metrics, openapi
from deepseek_api_compat.gateway.account import Account, Books, check_model, may_use
from deepseek_api_compat.gateway.admin import AdminApi
from deepseek_api_compat.gateway.breaker import fallback_chain
from deepseek_api_compat.gateway.chat import ChatService, Events, infill_ids, token_ids
from deepseek_api_compat.gateway.gate import Call, Route, header
from deepseek_api_compat.gateway.idempotency import HEADER, Recorder, Repeats, send_again
from deepseek_api_compat.gateway.plugin_relay import Watched
from deepseek_api_compat.gateway.plugins import Plugins, Run, reply_events
from deepseek_api_compat.gateway.pool import ModelPool
from deepseek_api_compat.gateway.relay import relay
from deepseek_api_compat.gateway.response import NOSNIFF, EventStream, Pulse, Sink, send_error, send_json
from deepseek_api_compat.gateway.sight import Sight
from deepseek_api_compat.gateway.usage import UsageApi
from deepseek_api_compat.plugins import Reply
from deepseek_api_compat.protocol import completion
from deepseek_api_compat.protocol import openai as wire
from deepseek_api_compat.protocol.events import Event, Finish
from deepseek_api_compat.security.keys import Principal

USERS = frozenset({"user", "admin"})
READERS = frozenset({"admin", "metrics"})
# Anybody may read this: paths and hosts are for the log.
LEDGER_PROBLEM = "Requests don't get into the ledger now; the service's log says why."
LIMITS_PROBLEM = "Limits are counted by each machine alone now: the Redis that they share is away."
LIMITS = ("max_tokens", "max_completion_tokens")
BodyHandler = Callable[[Call, bytes], Awaitable[None]]
THINKING_SUFFIXES = {"-thinking": True, "-nothinking": False}


class ModelDirectory:
    """Every name that clients may use, and the pool behind it."""

    def __init__(self, pools: list[ModelPool], created: int) -> None:
        self.pools = pools
        self.created = created
        self._by_name = {name: pool for pool in pools for name in pool.names}
        self._fallbacks = {pool.name: pool.settings.fallback for pool in pools}

    def pools_of(self, principal: Principal) -> list[ModelPool]:
        """Those that the key, or its token, may use: it is told of no others."""
        return [pool for pool in self.pools if may_use(principal, pool)]

    def find(self, name: str, principal: Principal) -> ModelPool:
        """Any pool, also one that the key may not use.

        Raises ModelNotFound, which lists the names that it may.
        """
        pool = self._by_name.get(name)
        if pool is None:
            raise self.unknown(name, principal)
        return pool

    def find_listed(self, name: str, principal: Principal) -> ModelPool:
        """One that the key may use. Raises ModelNotFound for any other name."""
        pool = self._by_name.get(name)
        if pool is None or not may_use(principal, pool):
            raise self.unknown(name, principal)
        return pool

    def unknown(self, name: str, principal: Principal) -> ModelNotFound:
        known = [known for known, pool in self._by_name.items() if may_use(principal, pool)]
        return ModelNotFound(name, known)

    def choose(self, name: str, principal: Principal) -> tuple[ModelPool, bool | None]:
        """The pool of that name, and whether the name says that the model shall think, or shall not.

        `NAME-thinking` and `NAME-nothinking` do, for any NAME that exists.
        """
        pool = self._by_name.get(name)
        if pool is not None:
            return pool, None
        for suffix, thinks in THINKING_SUFFIXES.items():
            base = self._by_name.get(name.removesuffix(suffix))
            if name.endswith(suffix) and base is not None:
                return base, thinks
        raise self.unknown(name, principal)

    def answering(self, pool: ModelPool, principal: Principal) -> ModelPool:
        """Who answers for `pool`: itself while it can, else the first of its fallbacks that can.

        Only one that the key may use; itself if there is none.
        """
        if not pool.settings.fallback or pool.begins:
            return pool
        others = (self._by_name[name] for name in fallback_chain(pool.name, self._fallbacks))
        return next((other for other in others if other.begins and may_use(principal, other)), pool)

    def describe(self, pool: ModelPool) -> dict[str, Any]:
        """OpenAI's model object; `aliases`, `context_length` and `format` are ours."""
        info = next((state.info for state in pool.states if state.info), None)
        described: dict[str, Any] = {
            "id": pool.name,
            "object": "model",
            "created": self.created,
            "owned_by": "deepseek-api",
            "aliases": pool.settings.aliases,
        }
        if info is not None:
            described["context_length"] = info.context
            described["format"] = pool.format(info)
        return described


class Chat(NamedTuple):
    """A chat request on its way; `request` is what `body` says, `thinks` what the model's name says."""

    body: bytes
    request: wire.ChatRequest
    thinks: bool | None
    pool: ModelPool
    account: Account
    out: EventStream

    @property
    def media(self) -> list[int]:
        """The sizes of its pictures and recordings, in characters of the body."""
        return wire.media_sizes(self.request.messages)


class Api:
    """The handlers, built once around what they need."""

    def __init__(
        self,
        directory: ModelDirectory,
        chat: ChatService,
        books: Books,
        usage: UsageApi,
        admin: AdminApi,
        repeats: Repeats,
        pulse: Pulse,
        plugins: Plugins,
        sight: Sight,
        settings: Settings,
    ) -> None:
        self._plugins = plugins
        self._sight = sight
        self._directory = directory
        self._chat = chat
        self._books = books
        self._usage = usage
        self._admin = admin
        self._repeats = repeats
        self._pulse = pulse
        self._limits = decode_limits(settings)
        self._openapi = openapi.document()

    def routes(self) -> list[Route]:
        return [
            Route("/chat/completions", {"POST": partial(self._once, self.chat_completions)}, USERS),
            Route("/completions", {"POST": partial(self._once, self.completions)}, USERS),
            Route("/embeddings", {"POST": partial(self._once, self.embeddings)}, USERS),
            Route("/tokenize", {"POST": self.tokenize}, USERS),
            Route("/detokenize", {"POST": self.detokenize}, USERS),
            Route("/models", {"GET": self.models}, USERS),
            Route("/models", {"GET": self.model}, USERS, takes_rest=True),
            Route("/openapi.json", {"GET": self.openapi}, USERS),
            Route("/metrics", {"GET": self.metrics}, READERS),
            Route("/health", {"GET": self.health}),
            Route("/ready", {"GET": self.ready}),
            Route("/version", {"GET": self.version}),
            *self._usage.routes(),
            *self._admin.routes(),
        ]

    async def _once(self, handler: BodyHandler, call: Call) -> None:
        """Answer; a request that was answered under its Idempotency-Key before has that answer again."""
        body = await call.body()
        key = header(call.scope, HEADER)
        if not key:
            await handler(call, body)
            return
        path = call.tally.endpoint
        place, answer = await self._repeats.begin(principal_of(call), key, path, body)
        if answer is not None:
            call.tally.status = 200
            await send_again(call.out, call.headers, answer)
            return
        out = call.out = Recorder(call.scope, partial(self._repeats.end, place))
        try:
            await handler(call, body)
        finally:
            out.close()

    async def chat_completions(self, call: Call, body: bytes) -> None:
        request = wire.decode_chat(body, self._limits)
        principal = principal_of(call)
        pool, thinks = self._directory.choose(request.model, principal)
        pool = self._directory.answering(pool, principal)
        account = self._open_account(call, pool)
        out = self._open(call, sse=request.stream)
        chat = Chat(body, request, thinks, pool, account, out)
        run = self._plugins.of(call.id, principal.id, pool.names, stream=request.stream)
        if run is None:
            await self._answer(call, out, self._unplugged(chat) if chat.media else self._work(chat))
            return
        try:
            await self._answer(call, out, self._plugged(chat, run))
        finally:
            self._plugins.ended(run, call.tally, left=call.connection_lost)

    async def _unplugged(self, chat: Chat) -> None:
        """Do a chat request with pictures or sound."""
        await self._work(await self._seen(chat))

    async def _plugged(self, chat: Chat, run: Run) -> None:
        """Do a chat request as its plugins leave it; what is read in its pictures they see too."""
        chat = await self._seen(chat)
        made = await run.request(chat.body)
        if isinstance(made, Reply):
            await chat.account.reserve(chat.pool, 0, 0, 0)  # a request without tokens
            await send_events(run.events(reply_events(made)), chat)
            return
        await self._work(chat._replace(body=made, request=wire.decode_chat(made, self._limits)), run)

    async def _seen(self, chat: Chat) -> Chat:
        """A chat request in which there is nothing but what its model takes."""
        if not chat.media:
            return chat
        body = await self._sight.translated(chat.body, chat.pool, chat.account.principal.id)
        return chat._replace(body=body, request=wire.decode_chat(body, self._limits))

    def _work(self, chat: Chat, run: Run | None = None) -> Coroutine[Any, Any, None]:
        """What answers a chat request, seen by the plugins of `run`."""
        pool, request = chat.pool, chat.request
        watched = run if run is not None and run.watching else None
        if pool.kind == "chat":
            out: Sink = chat.out
            if watched is not None:
                out = Watched(
                    out, watched, stream_of(chat) if request.stream else collector_of(chat), chat.account
                )
            return relay(
                pool,
                "/chat/completions",
                chat.body,
                out,
                chat.account,
                stream=request.stream,
                options=request.stream_options,
                limit=chat.account.limit(request.limit),
                choices=request.choices,
                replace=upstream_fields(chat.account, request, chat.thinks),
                apart=chat.media,
            )
        if chat.thinks is not None:
            request = msgspec.structs.replace(request, thinking=chat.thinks)
        functions = wire.declared_functions(chat.body) if request.tools else None
        events = self._chat.chat(pool, request, functions, chat.account)
        return send_events(events if watched is None else watched.events(events), chat)

    async def completions(self, call: Call, body: bytes) -> None:
        request = wire.decode_completion(body, self._limits)
        principal = principal_of(call)
        pool = self._directory.answering(self._directory.find(request.model, principal), principal)
        account = self._open_account(call, pool)
        out = self._open(call, sse=request.stream)
        if pool.kind == "chat":
            work = relay(
                pool,
                "/completions",
                body,
                out,
                account,
                stream=request.stream,
                options=request.stream_options,
                limit=account.limit(request.limit),
                choices=len(request.prompts) * request.choices,
                replace=upstream_fields(account, request),
            )
        else:
            work = self._complete(account, pool, request, out)
        await self._answer(call, out, work)

    async def _complete(
        self, account: Account, pool: ModelPool, request: wire.CompletionRequest, out: EventStream
    ) -> None:
        self._chat.check_choices(len(request.prompts) * request.choices)
        info = await pool.info()
        if request.suffix is not None:
            prompts = await pool.ask(lambda engine: infill_ids(engine, info, request))
        else:
            prompts = [
                prompt
                if isinstance(prompt, list)
                else await pool.ask(partial(token_ids, info=info, text=prompt, special=False))
                for prompt in request.prompts
            ]
        echo = None
        if request.echo:
            echo = [
                prompt if isinstance(prompt, str) else await pool.ask(methodcaller("detokenize", prompt))
                for prompt in request.prompts
            ]
        events = self._chat.complete(pool, request, prompts, account)
        identity = identity_of(account.id, "cmpl", pool)
        if request.stream:
            encoder = completion.CompletionStream(
                *identity,
                include_usage=request.include_usage,
                prompts=len(prompts),
                n=request.choices,
                echo=echo,
                profile=pool.settings.profile,
            )
            await stream_events(events, out, encoder, account)
        else:
            collector = completion.CompletionCollector(
                *identity, prompts=len(prompts), n=request.choices, echo=echo
            )
            await collect_events(events, out, collector, account)

    async def embeddings(self, call: Call, body: bytes) -> None:
        request = wire.decode_embedding(body, self._limits)
        pool = self._directory.find(request.model, principal_of(call))
        account = self._open_account(call, pool)
        if pool.kind == "chat":
            out = self._open(call, sse=False)
            await self._answer(call, out, relay(pool, "/embeddings", body, out, account))
            return
        if not any(engine.embedding for engine in pool.settings.engines):
            raise InvalidRequest(
                f"{pool.name} makes no embeddings: its engine needs embedding = true.", param="model"
            )
        if request.dimensions is not None:
            raise InvalidRequest(f"{pool.name} has vectors of one size only.", param="dimensions")
        info, engine = await pool.info(), await pool.engine()
        inputs = [
            text if isinstance(text, list) else await token_ids(engine, info, text, special=False)
            for text in request.inputs
        ]
        prompt = sum(len(ids) for ids in inputs)
        await account.reserve(pool, prompt, 0, 0)
        await account.dispatch((await pool.any_ready()).replica)
        call.tally.prompt_tokens = prompt
        vectors = await engine.embed(inputs)
        answer = completion.embedding_response(
            pool.name, vectors, call.tally.prompt_tokens, encoding=request.encoding_format
        )
        await self._json(call, answer)

    async def tokenize(self, call: Call) -> None:
        body = await call.body()
        request = wire.decode_tokenize(body, self._limits)
        pool = self._token_pool(call, request.model)
        if wire.media_sizes(request.messages or []):
            body = await self._sight.translated(body, pool, principal_of(call).id)
            request = wire.decode_tokenize(body, self._limits)
        info, engine = await pool.info(), await pool.engine()
        if request.messages is not None:
            functions = wire.declared_functions(body) if request.tools else None
            chat = wire.ChatRequest(model=pool.name, messages=request.messages, tools=request.tools)
            ids, _ = await self._chat.prompt_ids(pool, chat, functions)
        else:
            ids = await token_ids(engine, info, request.text, special=request.add_special_tokens)
        await self._json(call, {"tokens": ids, "count": len(ids), "max_model_len": info.context})

    async def detokenize(self, call: Call) -> None:
        request = wire.decode_detokenize(await call.body(), self._limits)
        engine = await self._token_pool(call, request.model).engine()
        text = await engine.detokenize(request.tokens)
        await self._json(call, {"content": text, "prompt": text})

    async def models(self, call: Call) -> None:
        pools = self._directory.pools_of(principal_of(call))
        listed = [self._directory.describe(pool) for pool in pools]
        await self._json(call, {"object": "list", "data": listed})

    async def model(self, call: Call) -> None:
        pool = self._directory.find_listed(call.rest, principal_of(call))
        await self._json(call, self._directory.describe(pool))

    async def openapi(self, call: Call) -> None:
        await self._json(call, self._openapi)

    async def metrics(self, call: Call) -> None:
        ledger = metrics.LedgerCollector(
            problem=self._books.problem is not None,
            lag=self._books.intake.lag_seconds,
            pending=self._books.intake.pending,
            damaged=self._books.intake.damaged,
        )
        limits = metrics.LimitsCollector(alone=self._books.limiter.away)
        text = await asyncio.to_thread(metrics.exposition, self._directory.pools, ledger, limits)
        call.tally.status = 200
        kind = b"content-type: text/plain; version=0.0.4; charset=utf-8\r\n"
        await call.out.whole(200, [*call.headers, kind, NOSNIFF], text)

    async def health(self, call: Call) -> None:
        await self._json(call, {"status": "ok"})

    async def ready(self, call: Call) -> None:
        missing = [pool.name for pool in self._directory.pools if not pool.ready]
        if len(missing) == len(self._directory.pools):
            call.tally.status = 503
            problem = EngineUnavailable(f"No engine is ready: {', '.join(missing)}.", retry_after=1.0)
            await send_error(call.out, problem, call.headers)
            return
        if self._books.refuses:
            call.tally.status = 503
            refusal = LedgerUnavailable(LEDGER_PROBLEM, retry_after=5.0)
            await send_error(call.out, refusal, call.headers)
            return
        problems = [LEDGER_PROBLEM] if self._books.problem else []
        if self._books.limiter.away:
            problems.append(LIMITS_PROBLEM)
        await self._json(call, {"status": "ready", "not_ready": missing, "problems": problems})

    async def version(self, call: Call) -> None:
        await self._json(call, {"version": __version__})

    def _open_account(self, call: Call, pool: ModelPool) -> Account:
        """The account of a request for a model. Raises PermissionDenied if its key may not use that."""
        principal = principal_of(call)
        assert call.grant is not None, "the gate has admitted it"
        call.tally.model = pool.name
        account = Account(self._books, call.id, principal, call.grant, call.tally, call.headers)
        call.account = account
        check_model(principal, pool)
        return account

    def _token_pool(self, call: Call, name: str | None) -> ModelPool:
        principal = principal_of(call)
        pool = self._directory.pools[0] if name is None else self._directory.find(name, principal)
        call.tally.model = pool.name
        check_model(principal, pool)
        if pool.kind != "token":
            raise InvalidRequest(
                f"{pool.name} is served by an upstream that gives no access to its tokens.", param="model"
            )
        return pool

    def _open(self, call: Call, *, sse: bool) -> EventStream:
        return EventStream(call.out, call.headers, self._pulse, sse=sse, now=call.tally.start)

    async def _answer(self, call: Call, out: EventStream, work: Coroutine[Any, Any, None]) -> None:
        """Do the work that fills `out`; whatever ends it early is told to the client if it is still there."""
        try:
            await work
        except ApiError as error:
            call.tally.error = error
            await out.fail(error)
        except asyncio.CancelledError:
            if not call.connection_lost:
                call.cut_off = True
                await out.fail(EngineUnavailable("The service is shutting down.", retry_after=5.0))
            raise
        finally:
            out.close()
            call.tally.status = out.status

    async def _json(self, call: Call, value: object) -> None:
        call.tally.status = 200
        await send_json(call.out, 200, value, call.headers)


def decode_limits(settings: Settings) -> wire.DecodeLimits:
    return wire.DecodeLimits(max_n=settings.limits.max_n, max_messages=settings.limits.max_messages)


def principal_of(call: Call) -> Principal:
    """Whose call it is, on a route that needs a key."""
    assert call.principal is not None, "the gate has let it in"
    return call.principal


def identity_of(request_id: str, kind: str, pool: ModelPool) -> tuple[str, int, str]:
    """id, created and model of an answer."""
    return f"{kind}-{request_id[4:]}", int(time.time()), pool.name


def upstream_fields(
    account: Account, request: wire.ChatRequest | wire.CompletionRequest, thinks: bool | None = None
) -> dict[str, Any]:
    """What an upstream is told in other words than the client's: `thinks` is what the model's name said."""
    fields: dict[str, Any] = {}
    if thinks is not None:
        fields["thinking"] = {"type": "enabled" if thinks else "disabled"}
    if account.principal.max_tokens is not None:
        given = [name for name in LIMITS if getattr(request, name, None) is not None]
        fields |= dict.fromkeys(given or ["max_tokens"], account.limit(request.limit))
    return fields


def send_events(events: Events, chat: Chat) -> Coroutine[Any, Any, None]:
    """Send events in the form that the request asks for."""
    if chat.request.stream:
        return stream_events(events, chat.out, stream_of(chat), chat.account)
    return collect_events(events, chat.out, collector_of(chat), chat.account)


def stream_of(chat: Chat) -> completion.ChatStream:
    return completion.ChatStream(
        *identity_of(chat.account.id, "chatcmpl", chat.pool),
        include_usage=chat.request.include_usage,
        n=chat.request.choices,
        profile=chat.pool.settings.profile,
    )


def collector_of(chat: Chat) -> completion.ChatCollector:
    identity = identity_of(chat.account.id, "chatcmpl", chat.pool)
    return completion.ChatCollector(*identity, n=chat.request.choices)


class Encoder(Protocol):
    """Turns events into SSE bytes."""

    def feed(self, events: list[Event]) -> bytes: ...
    def done(self) -> bytes: ...


class Collector(Protocol):
    """Turns events into one JSON answer."""

    def feed(self, events: list[Event]) -> None: ...
    def response(self) -> bytes: ...


async def stream_events(events: Events, out: EventStream, encoder: Encoder, account: Account) -> None:
    async with aclosing(events):
        async for group in events:
            note_finish(group, account)
            if data := encoder.feed(group):
                account.writing()
                await out.write(data)
    account.writing()
    await out.finish(encoder.done())


async def collect_events(events: Events, out: EventStream, collector: Collector, account: Account) -> None:
    async with aclosing(events):
        async for group in events:
            note_finish(group, account)
            collector.feed(group)
    account.writing()
    await out.finish(collector.response())


def note_finish(events: list[Event], account: Account) -> None:
    """What the ledger is told: why the first choice ended."""
    last = events[-1]
    if isinstance(last, Finish) and last.index == 0:
        account.tally.finish = last.reason
