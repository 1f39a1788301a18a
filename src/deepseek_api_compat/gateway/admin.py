"""The admin API, `/admin/v1/...`: what the commands of an operator do, over HTTP, for keys of role admin."""

from __future__ import annotations

import re
from typing import Any, get_args

from deepseek_api_compat.errors import (
    BodyTooLarge,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PermissionDenied,
)
from deepseek_api_compat.gateway.gate import Call, Handler, Route
from deepseek_api_compat.gateway.query import MAX_PAGE, Query, moment, number, one_of, text
from deepseek_api_compat.gateway.response import NOSNIFF
from deepseek_api_compat.gateway.usage import (
    NO_STORE,
    AskFor,
    actor_of,
    caller,
    period,
    send,
    usage_csv,
    usage_object,
)
from deepseek_api_compat.protocol.openai import decode_object
from deepseek_api_compat.security.key_fields import money
from deepseek_api_compat.store.ledger_rows import Outcome

ADMINS = frozenset({"admin"})
ONLY_HERE = ("",)  # no prefix: an admin's paths shall not look like a client's
MAX_BODY = 64 * 1024  # bytes
_KEY_ID = re.compile("[a-z2-7]{12}")


class AdminApi:
    """The handlers of `/admin/v1`. The supervisor does the work; a worker has no database.

    Failure policy: what the supervisor does not do within 10 s is a 503, and may be done all the same.
    Temporary tokens are refused, since a token made for less could else be turned into a key for more.
    """

    def __init__(self, ask: AskFor, currency: str) -> None:
        self._ask = ask
        self._currency = currency
        self._of_key: dict[str, Handler] = {"GET": self.key, "PATCH": self.update, "DELETE": self.delete}
        self._actions: dict[str, Handler] = {
            "rotate": self.rotate,
            "disable": self.disable,
            "enable": self.enable,
            "token": self.token,
        }

    def routes(self) -> list[Route]:
        below_key: dict[str, Handler] = dict.fromkeys((*self._of_key, "POST"), self.one_key)
        return [
            _route("/admin/v1/keys", {"GET": self.keys, "POST": self.create}),
            _route("/admin/v1/keys", below_key, takes_rest=True),
            _route("/admin/v1/engines", {"GET": self.engines}),
            _route("/admin/v1/engines/drain", {"POST": self.drain}),
            _route("/admin/v1/engines/restart", {"POST": self.restart}),
            _route("/admin/v1/usage", {"GET": self.usage}),
            _route("/admin/v1/requests", {"GET": self.requests}),
            _route("/admin/v1/audit", {"GET": self.audit}),
        ]

    async def keys(self, call: Call) -> None:
        await send(call, _list("key", await self._do(call, "keys.list", {})))

    async def create(self, call: Call) -> None:
        fields = await _fields(call)
        await send(call, {"object": "key", **await self._do(call, "keys.create", fields)})

    async def one_key(self, call: Call) -> None:
        """What is below `/admin/v1/keys/`: `ID`, and `ID/ACTION` for a POST."""
        id, slash, action = call.rest.partition("/")
        handlers = self._of_key
        if slash:
            if action not in self._actions:
                raise NotFound(f"There is no route {call.scope['path']}.", code="route_not_found")
            handlers = {"POST": self._actions[action]}
        handler = handlers.get("GET" if call.scope["method"] == "HEAD" else call.scope["method"])
        if handler is None:
            raise MethodNotAllowed(call.scope["method"], tuple(handlers))
        if not _KEY_ID.fullmatch(id):
            raise NotFound("That is no id of a key.", code="not_found")
        await handler(call)

    async def key(self, call: Call) -> None:
        await self._on_key(call, "keys.get")

    async def update(self, call: Call) -> None:
        fields = await _fields(call)
        if not fields:
            raise InvalidRequest("Nothing to change is given.")
        await self._on_key(call, "keys.update", fields)

    async def delete(self, call: Call) -> None:
        key = await self._do(call, "keys.delete", {"key": _key_id(call)})
        await send(call, {"object": "key", "id": key["id"], "deleted": True})

    async def rotate(self, call: Call) -> None:
        await self._on_key(call, "keys.rotate", await _fields(call))

    async def disable(self, call: Call) -> None:
        await self._on_key(call, "keys.set_enabled", {"enabled": False})

    async def enable(self, call: Call) -> None:
        await self._on_key(call, "keys.set_enabled", {"enabled": True})

    async def token(self, call: Call) -> None:
        fields = await _fields(call)
        made = await self._do(call, "keys.token", {**fields, "key": _key_id(call)})
        await send(call, {"object": "token", **made})

    async def engines(self, call: Call) -> None:
        await send(call, _list("engine", await self._do(call, "engines.list", {})))

    async def drain(self, call: Call) -> None:
        await send(call, _list("engine", await self._do(call, "engines.drain", await _fields(call))))

    async def restart(self, call: Call) -> None:
        """Answers when it has begun: loading a model takes longer than an answer should."""
        fields = {**await _fields(call), "wait": False}
        await send(call, _list("engine", await self._do(call, "engines.restart", fields)))

    async def usage(self, call: Call) -> None:
        known = {"from", "to", "group_by", "model", "key", "format"}
        query = Query(call.scope["query_string"], known)
        wanted = {**period(query, {"key", "model", "hour", "day"}), "key_id": query.get("key", text)}
        form = query.get("format", one_of("json", "csv"))
        found = await self._do(call, "ledger.summary", wanted)
        answer = usage_object(wanted, found, self._currency)
        if form != "csv":
            await send(call, answer)
            return
        call.tally.status = 200
        kind = b"content-type: text/csv; charset=utf-8\r\n"
        await call.out.whole(200, [*call.headers, NO_STORE, NOSNIFF, kind], usage_csv(answer))

    async def requests(self, call: Call) -> None:
        """Rows of the ledger, newest first, a page at a time."""
        query = Query(call.scope["query_string"], {"from", "to", "key", "model", "outcome", "limit", "after"})
        limit = query.get("limit", number(1, MAX_PAGE)) or 100
        params: dict[str, Any] = {
            "since": query.get("from", moment),
            "until": query.get("to", moment),
            "key_id": query.get("key", text),
            "model": query.get("model", text),
            "outcome": query.get("outcome", one_of(*get_args(Outcome))),
            "before": query.get("after", _row_place),
        }
        rows = await self._do(call, "ledger.rows", {**params, "limit": limit})
        after = f"{rows[-1]['started']}.{rows[-1]['request_id']}" if len(rows) == limit else None
        shown = [{**row, "price": money(row["price"])} for row in rows]
        await send(call, {**_list("request", shown), "currency": self._currency, "next": after})

    async def audit(self, call: Call) -> None:
        query = Query(call.scope["query_string"], {"limit", "after"})
        limit = query.get("limit", number(1, MAX_PAGE)) or 100
        params = {"limit": limit, "before": query.get("after", number(1, 2**53))}
        found = await self._do(call, "keys.audit", params)
        after = str(found[-1]["number"]) if len(found) == limit else None
        await send(call, {**_list("audit_entry", found), "next": after})

    async def _on_key(self, call: Call, op: str, fields: dict[str, Any] | None = None) -> None:
        key = await self._do(call, op, {**(fields or {}), "key": _key_id(call)})
        await send(call, {"object": "key", **key})

    async def _do(self, call: Call, op: str, params: dict[str, Any]) -> Any:
        if caller(call).token_id is not None:
            raise PermissionDenied("Temporary tokens can't use the admin API: send the key itself.")
        return await self._ask(op, params, actor_of(call))


def _route(path: str, methods: dict[str, Handler], *, takes_rest: bool = False) -> Route:
    return Route(path, methods, ADMINS, takes_rest=takes_rest, prefixes=ONLY_HERE)


def _list(kind: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    return {"object": "list", "data": [{"object": kind, **one} for one in found]}


def _key_id(call: Call) -> str:
    return call.rest.partition("/")[0]


def _row_place(cursor: str) -> tuple[int, str]:
    started, dot, id = cursor.partition(".")
    if not (dot and started.isascii() and started.isdigit() and len(started) < 16 and id):
        raise ValueError("the `next` of the page before")
    return int(started), id


async def _fields(call: Call) -> dict[str, Any]:
    """The JSON object in the body; {} if there is no body."""
    body = await call.body()
    if len(body) > MAX_BODY:
        raise BodyTooLarge(f"The request body is over {MAX_BODY} bytes.")
    fields = decode_object(body) if body else {}
    if "key" in fields:  # the path names it
        raise InvalidRequest("There is no field `key`.", param="key")
    return fields
