"""The one door: every request passes here, and what is not allowed is refused.

request id -> address -> route -> authenticate -> address of the key -> role -> limits -> handler -> settle.
A route is open without a key only if its path is in `public.PUBLIC`. No header but Authorization and
x-api-key opens anything: not Host, not X-Original-URL, not a method override. Errors become OpenAI error
objects here and nowhere else.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import unquote

from deepseek_api_compat.config import Settings
from deepseek_api_compat.errors import (
    ApiError,
    AuthenticationFailed,
    BodyTooLarge,
    EngineUnavailable,
    InternalError,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
)
from deepseek_api_compat.gateway import metrics
from deepseek_api_compat.gateway.account import Account
from deepseek_api_compat.gateway.cors import Cors
from deepseek_api_compat.gateway.journal import Journal
from deepseek_api_compat.gateway.limits import Grant, Limiter, OverLimit
from deepseek_api_compat.gateway.logs import RequestLog, log_body
from deepseek_api_compat.gateway.metrics import Tally
from deepseek_api_compat.gateway.public import PUBLIC
from deepseek_api_compat.gateway.response import Headers, Responder, rate_headers, send_error
from deepseek_api_compat.security.keys import KeyTable, Principal
from deepseek_api_compat.security.network import UNKNOWN, AllowList, TrustedProxies
from deepseek_api_compat.security.scope import networks

Scope = MutableMapping[str, Any]

PREFIXES = ("/v1/compat", "/compat/v1", "/v1", "/beta", "")
logger = logging.getLogger("deepseek_api")


class Call:
    """One request on its way through its handler."""

    __slots__ = (
        "_max_body",
        "account",
        "address",
        "cut_off",
        "grant",
        "headers",
        "id",
        "out",
        "principal",
        "rest",
        "scope",
        "tally",
    )

    def __init__(self, scope: Scope, request_id: str, tally: Tally, max_body: int) -> None:
        self.scope = scope
        self.out = Responder(scope)
        self.id = request_id
        self.tally = tally
        self._max_body = max_body
        self.headers: Headers = [b"x-request-id: %b\r\n" % request_id.encode()]
        client = scope["client"]
        self.address: str = client[0] if client else UNKNOWN  # the gate asks the proxies it trusts
        self.principal: Principal | None = None
        self.grant: Grant | None = None
        self.account: Account | None = None  # of a request for a model
        self.cut_off = False  # its client has been told that the service shuts down
        self.rest = ""  # what follows the route's path, as the id in /models/{id}

    @property
    def connection_lost(self) -> bool:
        return bool(self.scope["connection"].transport.is_closing())

    async def body(self) -> bytes:
        """The whole request body, once. Raises BodyTooLarge before reading more than the cap."""
        cycle = self.scope["cycle"]
        if cycle.more_body:  # of most it came with the headers
            length = header(self.scope, b"content-length")
            if length and int(length) > self._max_body:  # the HTTP parser has checked that it is a number
                raise self._too_large()
        while cycle.more_body and cycle.size <= self._max_body:
            await cycle.arrival()
        cycle.flow.resume_reading()
        if cycle.size > self._max_body:
            raise self._too_large()
        body = b"".join(cycle.parts)
        cycle.parts.clear()  # the connection keeps its last cycle
        return body

    async def end_early(self, error: ApiError) -> None:
        """Report an error that its handler could not report; break off what has begun."""
        if not self.out.started:
            await send_error(self.out, error, self.headers)
        elif not self.out.complete:
            self.out.abort()

    def _too_large(self) -> BodyTooLarge:
        self.out.close_afterwards()
        return BodyTooLarge(f"The request body is over {self._max_body} bytes.")


class LoggedCall(Call):
    """A call whose body goes to the log, as `log.bodies` asks."""

    __slots__ = ()

    async def body(self) -> bytes:
        body = await super().body()
        log_body(self.id, body)
        return body


Handler = Callable[[Call], Awaitable[None]]


class Route:
    """A path under each of `prefixes`, for keys of the roles in `open_to`; none may use it if that is empty.

    Needs no key, whatever its role, if its path is in PUBLIC; such a route has no `open_to`.
    """

    __slots__ = ("methods", "open_to", "path", "prefixes", "public", "takes_rest")

    def __init__(
        self,
        path: str,
        methods: dict[str, Handler],
        open_to: frozenset[str] = frozenset(),
        takes_rest: bool = False,
        prefixes: Sequence[str] = PREFIXES,
    ) -> None:
        self.path = path
        self.methods = methods
        self.open_to = open_to
        self.prefixes = prefixes
        self.takes_rest = takes_rest
        self.public = path in PUBLIC and not open_to and not takes_rest


def header(scope: Scope, name: bytes) -> bytes:
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value)
    return b""


def authenticate(keys: KeyTable, scope: Scope) -> Principal:
    """Whose key or token the request shows: as `Authorization: Bearer KEY`, or as `x-api-key: KEY`.

    Raises AuthenticationFailed, also if one of the two headers is there twice, or both and not with the same
    key: a proxy in front may have looked at the other one.
    """
    bearer: bytes | None = None
    alone: bytes | None = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            if bearer is not None:
                raise AuthenticationFailed("The request has more than one Authorization header.")
            bearer = value
        elif name == b"x-api-key":
            if alone is not None:
                raise AuthenticationFailed("The request has more than one x-api-key header.")
            alone = value
    if alone is None:
        return keys.authenticate(bearer)
    alone = alone.strip(b" \t")
    if bearer is None:
        return keys.authenticate_key(alone)
    if bearer.partition(b" ")[2].strip(b" ") != alone:
        raise AuthenticationFailed("The headers Authorization and x-api-key show different keys.")
    return keys.authenticate(bearer)


class Gate:
    """The ASGI application.

    Failure policy: an unknown error is a 500 with the request id, logged once. A route is found by its path
    as it was sent, byte by byte: `/%6detrics` and `/v1//models` are no routes, and need a key to be told so.
    """

    def __init__(
        self, routes: list[Route], keys: KeyTable, limiter: Limiter, journal: Journal, settings: Settings
    ) -> None:
        self.keys = keys
        self._limiter = limiter
        self._journal = journal
        self._max_body = settings.server.max_body_bytes
        self._call = LoggedCall if settings.log.bodies else Call
        self._requests = RequestLog(settings.log)
        places = [((prefix + route.path).encode(), route) for route in routes for prefix in route.prefixes]
        self._exact = {path: route for path, route in places if not route.takes_rest}
        self._with_rest = [(path + b"/", route) for path, route in places if route.takes_rest]
        network = settings.network
        self._allow = AllowList(networks(network.allow)) if network.allow else None
        self._proxies = TrustedProxies(networks(network.trusted_proxies)) if network.trusted_proxies else None
        self._cors = Cors(network.cors_origins) if network.cors_origins else None
        self._asks_first = bool(network.allow or network.trusted_proxies or network.cors_origins)
        self._id_prefix = os.urandom(6).hex()
        self._ids = itertools.count(1)

    async def __call__(self, scope: Scope, _receive: object, _send: object) -> None:
        """ASGI, but for how it comes to its connection: body and answer go through `scope["cycle"]`."""
        tally = Tally("unknown", time.monotonic())
        request_id = f"req-{self._id_prefix}{next(self._ids):08x}"
        call = self._call(scope, request_id, tally, self._max_body)
        cancelled = None
        try:
            await self._serve(call)
        except ApiError as error:
            tally.status = error.status
            tally.error = error
            if tally.model == "":
                metrics.REFUSED.labels(error.code or error.type).inc()
            await send_error(call.out, error, call.headers)
        except asyncio.CancelledError:
            # Ends here: whoever cancelled, the connection or the drain, only wants this task to be over.
            # A connection that we closed ourselves, after the last word, was not lost.
            cancelled = "client" if call.connection_lost and not call.cut_off else "shutdown"
            if cancelled == "client":
                tally.status = 499
                metrics.CLIENT_GONE.labels(tally.endpoint).inc()
            else:
                tally.status = 503
                await call.end_early(EngineUnavailable("The service is shutting down.", retry_after=5.0))
        except Exception:
            tally.status = 500
            tally.error = InternalError(f"Internal error; its request id is {call.id}.")
            logger.exception("request %s failed", call.id)
            await call.end_early(tally.error)
        finally:
            self._requests.settled(request_id, call.principal, tally, cancelled, time.monotonic())
            self._settle(call, cancelled)

    async def _serve(self, call: Call) -> None:
        if self._asks_first and await self._answered_at_once(call):
            return
        scope = call.scope
        route = self._find(call, scope["raw_path"])
        if route is None or not route.public:
            principal = call.principal = authenticate(self.keys, scope)
            if principal.networks is not None:
                _check_address(principal.networks, call.address)
            if route is None:
                raise NotFound(f"There is no route {scope['path']}.", code="route_not_found")
            if principal.role not in route.open_to:
                raise PermissionDenied(f"A key of role {principal.role} may not use {route.path}.")
        call.tally.endpoint = route.path
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        handler = route.methods.get(method)
        if handler is None:
            raise MethodNotAllowed(scope["method"], tuple(route.methods))
        if call.principal is not None:
            try:
                grant = call.grant = await self._limiter.admit_request(call.principal)
            except OverLimit as error:
                call.headers += rate_headers(error.requests, error.tokens)
                raise
            call.headers += rate_headers(grant.requests, grant.tokens)
        await handler(call)

    def _settle(self, call: Call, cancelled: str | None) -> None:
        if call.account is not None:
            call.account.settle(cancelled=cancelled)
        elif call.grant is not None:
            call.grant.settle(0, 0)
        error = call.tally.error
        if error is not None and call.principal is not None and call.account is None:
            self._journal.refused(call.principal.id, error.code or error.type)
        call.tally.settle(time.monotonic())

    async def _answered_at_once(self, call: Call) -> bool:
        """What is settled before a key is looked at: who the client is, whether it is let in, preflights."""
        scope = call.scope
        preflight = None
        if self._cors is not None:
            origin = header(scope, b"origin")
            if scope["method"] == "OPTIONS":
                method = header(scope, b"access-control-request-method")
                names = header(scope, b"access-control-request-headers")
                preflight = self._cors.preflight(origin, method, names)
            call.headers += preflight or self._cors.headers(origin)
        if self._proxies is not None:
            values = [value for key, value in scope["headers"] if key == b"x-forwarded-for"]
            call.address = self._proxies.client(call.address, b",".join(values))
        if self._allow is not None:
            _check_address(self._allow, call.address)
        if preflight is None:
            return False
        call.tally.status = 200
        await call.out.whole(200, call.headers, b"")
        return True

    def _find(self, call: Call, path: bytes) -> Route | None:
        route = self._exact.get(path)
        if route is None and path.endswith(b"/"):
            route = self._exact.get(path[:-1])
        if route is None:
            for prefix, candidate in self._with_rest:
                if path.startswith(prefix) and len(path) > len(prefix):
                    call.rest = unquote(path[len(prefix) :])
                    return candidate
        return route


def _check_address(allowed: AllowList, address: str) -> None:
    if not allowed.permits(address):
        # Its own address is all that a client is told: who else is let in is nobody's business.
        who = f"the address {address}" if address else "an address that no trusted proxy vouches for"
        raise PermissionDenied(f"Requests from {who} are not allowed.", code="address_not_allowed")
