"""The gate's decisions, one request at a time, on connections that only note what is written."""

from __future__ import annotations

import asyncio
import gc
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from uvicorn.server import ServerState

import deepseek_api_compat
from deepseek_api_compat.config import NetworkSettings, ServerSettings, Settings
from deepseek_api_compat.gateway.gate import Call, Gate, Route
from deepseek_api_compat.gateway.http import HttpProtocol
from deepseek_api_compat.gateway.local_limits import LocalLimiter
from deepseek_api_compat.gateway.public import PUBLIC
from deepseek_api_compat.gateway.response import PAGE
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.gateway.worker import server_config
from deepseek_api_compat.security.keys import KeyTable, key_hash, new_key
from deepseek_api_compat.store.base import KeyRecord, Role

MASTER = bytes(32)
ORIGIN = "https://app.example.com"
CLIENT = "198.51.100.9"


class Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def code(self) -> str | None:
        return json.loads(self.body)["error"]["code"]


class Refusals:
    """In the place of the journal."""

    def __init__(self) -> None:
        self.codes: list[str] = []

    def refused(self, _key_id: str, code: str) -> None:
        self.codes.append(code)


class Door:
    """A gate with a few routes, and keys: of a user, of a metrics reader, and one for 10.0.0.0/8 only."""

    def __init__(self, **network: Any) -> None:
        self.seen: list[Call] = []
        self.refusals = Refusals()
        self.keys: dict[str, str] = {}
        records = [
            self._record("user", "user", 0, None),
            self._record("metrics", "metrics", 1, None),
            self._record("inside", "user", 2, ("10.0.0.0/8",)),
        ]
        routes = [
            Route("/models", {"GET": self._handle}, frozenset({"user"})),
            Route("/models", {"GET": self._handle}, frozenset({"user"}), takes_rest=True),
            Route("/metrics", {"GET": self._handle}, frozenset({"metrics"})),
            Route("/health", {"GET": self._handle}),
            Route("/forgotten", {"GET": self._handle}),
            Route("/health", {"GET": self._handle}, takes_rest=True),
            Route("/version", {"GET": self._handle}, frozenset({"user"})),
        ]
        settings = Settings(network=NetworkSettings(**network))
        limiter = LocalLimiter(
            SharedMemory.create(LocalLimiter.cells_for(0, 1)), 0, settings.limits, [], workers=1
        )
        self.gate = Gate(routes, KeyTable(records, MASTER), limiter, self.refusals, settings)  # type: ignore[arg-type]

    async def ask(
        self,
        path: str,
        *headers: tuple[str, str],
        key: str | None = None,
        method: str = "GET",
        peer: str | None = CLIENT,
    ) -> Answer:
        sent = [(name.encode(), value.encode()) for name, value in headers]
        if key is not None:
            sent.append((b"authorization", f"Bearer {self.keys.get(key, key)}".encode()))
        written: list[bytes] = []
        transport = SimpleNamespace(write=written.append, close=lambda: None, is_closing=lambda: False)
        cycle = SimpleNamespace(
            transport=transport,
            flow=SimpleNamespace(write_paused=False),
            on_response=lambda: None,
            default_headers=[],
            keep_alive=True,
            disconnected=False,
            response_started=False,
            response_complete=False,
        )
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "raw_path": path.encode(),
            "path": path,
            "query_string": b"",
            "headers": sent,
            "client": None if peer is None else (peer, 1234),
            "connection": SimpleNamespace(handler=None, transport=transport),
            "cycle": cycle,
        }
        await self.gate(scope, _nothing, None)
        head, _, body = b"".join(written).partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        pairs = [tuple(line.split(": ", 1)) for line in lines]
        assert len(dict(pairs)) == len(pairs), f"a header twice: {pairs}"
        return Answer(int(status.split(" ")[1]), dict(pairs), body)

    async def _handle(self, call: Call) -> None:
        self.seen.append(call)
        await call.out.whole(200, call.headers, b"done")

    def _record(self, name: str, role: Role, slot: int, networks: tuple[str, ...] | None) -> KeyRecord:
        id, key = new_key()
        self.keys[name] = key
        return KeyRecord(
            id=id,
            name=name,
            role=role,
            hash=key_hash(MASTER, key.encode()),
            created=0,
            slot=slot,
            networks=networks,
        )


async def _nothing() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


@pytest.fixture
def door() -> Door:
    return Door()


# What needs a key


async def test_what_is_on_the_list_needs_no_key(door: Door):
    for prefix in ("", "/v1", "/beta", "/v1/compat", "/compat/v1"):
        assert (await door.ask(f"{prefix}/health")).status == 200
        assert (await door.ask(f"{prefix}/health/")).status == 200


async def test_the_list_is_this_one():
    """Whoever makes something public changes this test, and says why."""
    assert {"/health", "/ready", "/version"} == PUBLIC


async def test_a_route_without_roles_is_open_to_nobody(door: Door):
    """Forgetting to say whom a route is for closes it."""
    assert (await door.ask("/forgotten")).status == 401
    for key in ("user", "metrics"):
        assert (await door.ask("/forgotten", key=key)).status == 403
    assert door.seen == []


@pytest.mark.parametrize("path", ["/health/x", "/health//", "/health/../models"])
async def test_what_is_below_a_public_path_is_not_public(door: Door, path: str):
    assert (await door.ask(path)).status == 401
    assert (await door.ask(path, key="user")).status == 403


async def test_a_route_for_roles_needs_a_key_even_if_its_path_is_on_the_list(door: Door):
    assert (await door.ask("/version")).status == 401
    assert (await door.ask("/version", key="metrics")).status == 403
    assert (await door.ask("/version", key="user")).status == 200


async def test_without_a_key_nobody_learns_what_there_is(door: Door):
    answers = [await door.ask(path) for path in ("/models", "/models/x", "/metrics", "/nothing", "/")]
    assert {answer.status for answer in answers} == {401}
    assert len({answer.body for answer in answers}) == 1


@pytest.mark.parametrize(
    "path",
    [
        "/%6dodels",
        "/models%2F",
        "/v1%2Fmodels",
        "/%2e/models",
        "/./models",
        "//models",
        "/MODELS",
        "/models;x",
        "/models.",
    ],
)
async def test_a_path_is_a_route_only_as_it_is_written(door: Door, path: str):
    assert (await door.ask(path)).status == 401
    assert (await door.ask(path, key="user")).status == 404
    assert door.seen == []


async def test_the_rest_of_a_path_may_be_encoded(door: Door):
    assert (await door.ask("/v1/models/org%2Fname%20x", key="user")).status == 200
    assert door.seen[0].rest == "org/name x"


@pytest.mark.parametrize(
    "headers",
    [
        [("authorization", "{user}"), ("authorization", "{user}")],
        [("authorization", "{user}"), ("authorization", "Bearer wrong")],
        [("authorization", ""), ("authorization", "{user}")],
    ],
)
async def test_two_authorization_headers_are_refused(door: Door, headers: list[tuple[str, str]]):
    filled = [(name, value.replace("{user}", f"Bearer {door.keys['user']}")) for name, value in headers]
    assert (await door.ask("/models", *filled)).status == 401


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("x-api-key", "{user}")], 200),
        ([("x-api-key", " {user}")], 200),
        ([("x-api-key", "{user}"), ("authorization", "Bearer {user}")], 200),
        ([("authorization", "bearer  {user}"), ("x-api-key", "{user}")], 200),
        ([("x-api-key", "")], 401),
        ([("x-api-key", "Bearer {user}")], 401),
        ([("x-api-key", "{user}"), ("x-api-key", "{user}")], 401),
        ([("x-api-key", "{user}"), ("authorization", "Bearer {inside}")], 401),
        ([("x-api-key", "{user}"), ("authorization", "Basic {user}")], 401),
        ([("x-api-key", "{user}"), ("authorization", "")], 401),
        ([("x-api-key", ""), ("authorization", "Bearer {user}")], 401),
    ],
)
async def test_a_key_alone_in_a_header(door: Door, headers: list[tuple[str, str]], status: int):
    filled = [(name, value.format(**door.keys)) for name, value in headers]
    assert (await door.ask("/models", *filled)).status == status


# Addresses


async def test_the_allow_list_comes_before_everything(door: Door):
    door = Door(allow=["10.0.0.0/8", "2001:db8::/32"])
    for path, key in (("/health", None), ("/models", "user"), ("/nothing", None), ("/models", "wrong")):
        refused = await door.ask(path, key=key)
        assert (refused.status, refused.code) == (403, "address_not_allowed")
        assert "10.0.0" not in refused.body.decode()
    for peer in ("10.1.2.3", "::ffff:10.1.2.3", "2001:db8::7", "2001:db8::7%eth0"):
        assert (await door.ask("/health", peer=peer)).status == 200
        assert (await door.ask("/models", peer=peer)).status == 401
        assert (await door.ask("/models", peer=peer, key="user")).status == 200
    assert (await door.ask("/health", peer=None)).status == 403  # a Unix socket has no address


async def test_the_networks_of_a_key_hold_after_it_is_known(door: Door):
    refused = await door.ask("/models", key="inside")
    assert (refused.status, refused.code) == (403, "address_not_allowed")
    assert door.refusals.codes == ["address_not_allowed"]
    assert (await door.ask("/models", key="inside", peer="10.0.0.1")).status == 200
    assert (await door.ask("/nothing", key="inside")).status == 403
    assert (await door.ask("/health", key="inside")).status == 200  # public: nobody looks at the key


@pytest.mark.parametrize(
    "name", ["x-forwarded-for", "forwarded", "x-real-ip", "x-client-ip", "true-client-ip", "host"]
)
async def test_no_header_changes_the_address_without_a_trusted_proxy(door: Door, name: str):
    value = "for=10.0.0.1" if name == "forwarded" else "10.0.0.1"
    assert (await door.ask("/models", (name, value), key="inside")).status == 403
    listed = Door(allow=["10.0.0.0/8"])
    assert (await listed.ask("/health", (name, value))).status == 403


async def test_a_trusted_proxy_says_who_its_client_is():
    door = Door(trusted_proxies=["192.0.2.1"], allow=["10.0.0.0/8", "192.0.2.1"])
    for headers, status in (
        ([("x-forwarded-for", "10.0.0.1")], 200),
        ([("x-forwarded-for", CLIENT)], 403),
        ([("x-forwarded-for", f"10.0.0.1, {CLIENT}")], 403),
        ([("x-forwarded-for", "10.0.0.1"), ("x-forwarded-for", CLIENT)], 403),
        ([("x-forwarded-for", CLIENT), ("x-forwarded-for", "10.0.0.1")], 200),
        ([("x-forwarded-for", "unknown")], 403),
        ([("forwarded", f"for={CLIENT}")], 200),  # not believed: the request is the proxy's own
        ([], 200),
    ):
        assert (await door.ask("/health", *headers, peer="192.0.2.1")).status == status, headers
    assert (
        await door.ask("/models", ("x-forwarded-for", "10.0.0.9"), key="inside", peer="192.0.2.1")
    ).status == 200
    assert door.seen[-1].address == "10.0.0.9"
    unknown = await door.ask("/health", ("x-forwarded-for", "unknown"), peer="192.0.2.1")
    assert "no trusted proxy vouches" in unknown.body.decode()


# Pages of other sites


def preflight(origin: str = ORIGIN, names: str = "authorization, x-stainless-os") -> list[tuple[str, str]]:
    return [
        ("origin", origin),
        ("access-control-request-method", "POST"),
        ("access-control-request-headers", names),
    ]


async def test_a_preflight_from_a_listed_origin_needs_no_key_and_reaches_no_handler():
    door = Door(cors_origins=[ORIGIN])
    answers = [
        await door.ask(path, *preflight(), method="OPTIONS") for path in ("/models", "/nothing", "/health")
    ]
    for answer in answers:
        assert (answer.status, answer.body) == (200, b"")
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert answer.headers["access-control-allow-headers"] == "authorization, x-stainless-os"
        assert "POST" in answer.headers["access-control-allow-methods"]
        assert answer.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in answer.headers
    assert door.seen == []


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example.com",
        "null",
        "*",
        "",
        ORIGIN + ".evil.test",
        ORIGIN.upper(),
        "http://app.example.com",
        ORIGIN + ":443",
    ],
)
async def test_other_origins_get_nothing(origin: str):
    door = Door(cors_origins=[ORIGIN])
    refused = await door.ask("/models", *preflight(origin), method="OPTIONS")
    assert refused.status == 401
    read = await door.ask("/models", ("origin", origin), key="user")
    assert read.status == 200
    for answer in (refused, read):
        assert [name for name in answer.headers if name.startswith("access-control")] == []
        assert answer.headers["vary"] == "origin"


async def test_answers_and_errors_can_be_read_by_a_listed_page():
    door = Door(cors_origins=["http://localhost:3000", ORIGIN])
    for key, status in (("user", 200), (None, 401), ("metrics", 403)):
        answer = await door.ask("/models", ("origin", ORIGIN), key=key)
        assert answer.status == status
        assert answer.headers["access-control-allow-origin"] == ORIGIN
        assert "x-request-id" in answer.headers["access-control-expose-headers"]
        assert answer.headers["vary"] == "origin"


async def test_a_preflight_is_not_what_merely_looks_like_one():
    door = Door(cors_origins=[ORIGIN])
    assert (await door.ask("/models", *preflight())).status == 401  # GET
    assert (await door.ask("/models", ("origin", ORIGIN), method="OPTIONS")).status == 401
    assert (await door.ask("/models", *preflight()[1:], method="OPTIONS")).status == 401


@pytest.mark.parametrize("names", ["x\r\nset-cookie: a=b", "a b", "(x)", "x" * 5000])
async def test_only_names_of_headers_are_sent_back(names: str):
    door = Door(cors_origins=[ORIGIN])
    answer = await door.ask("/models", *preflight(names=names), method="OPTIONS")
    assert answer.status == 200
    assert "access-control-allow-headers" not in answer.headers


async def test_without_a_listed_origin_there_is_no_cors(door: Door):
    answer = await door.ask("/models", *preflight(), method="OPTIONS")
    assert answer.status == 401
    answer = await door.ask("/models", ("origin", ORIGIN), key="user")
    assert [name for name in answer.headers if name.startswith("access-control") or name == "vary"] == []


async def test_the_allow_list_holds_for_preflights_too():
    door = Door(cors_origins=[ORIGIN], allow=["10.0.0.0/8"])
    assert (await door.ask("/models", *preflight(), method="OPTIONS")).status == 403
    assert (await door.ask("/models", *preflight(), method="OPTIONS", peer="10.0.0.1")).status == 200


# Pages


def test_pages_keep_other_sites_out():
    headers = dict(line.split(": ", 1) for line in PAGE.decode().rstrip("\r\n").split("\r\n"))
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"


def test_every_page_has_the_headers_of_pages():
    """No other place of the source writes an answer of type HTML."""
    package = Path(deepseek_api_compat.__file__).parent
    found = [
        file.name for file in package.rglob("*.py") for _ in re.findall("text/html", file.read_text("utf-8"))
    ]
    assert found == ["response.py"]


# What is left of a request


async def test_a_request_leaves_nothing_to_the_garbage_collector():
    """All that was made for it goes at its end; cycles would make the collector run, again and again."""
    door = Door()
    config = server_config(door.gate, ServerSettings(), None)
    config.load()
    connection = HttpProtocol(config, ServerState(), {}, asyncio.get_running_loop())
    written: list[bytes] = []
    connection.connection_made(
        SimpleNamespace(  # type: ignore[arg-type]
            write=written.append,
            close=lambda: None,
            is_closing=lambda: False,
            get_extra_info=lambda name: None,
        )
    )
    head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {door.keys['user']}\r\n\r\n".encode()

    async def ask(times: int) -> None:
        for _ in range(times):
            connection.data_received(head)
            await connection.handler
        door.seen.clear()

    await ask(1)
    gc.collect()
    gc.disable()
    try:
        await ask(10)
        assert gc.collect() < 10
    finally:
        gc.enable()
    assert len(written) == 11
    assert all(answer.startswith(b"HTTP/1.1 200 ") for answer in written)
