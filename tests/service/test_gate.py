"""Nobody gets around the gate: every route, written in all ways that have fooled a server, without a key."""

from __future__ import annotations

import json
import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deepseek_api_compat.config import Settings
from deepseek_api_compat.gateway import app
from deepseek_api_compat.gateway.app import Application, shared_cells
from deepseek_api_compat.gateway.gate import Route
from deepseek_api_compat.gateway.idempotency import Repeats
from deepseek_api_compat.gateway.public import PUBLIC
from deepseek_api_compat.gateway.shared import SharedMemory
from deepseek_api_compat.security.keys import KeyTable, new_key
from fakes.chat_upstream import ChatUpstream
from fakes.configs import PATIENT, chat, upstream_model
from fakes.observe import log_of
from fakes.service import Service
from fakes.wire import Answer, Wire, call, request

METHODS = (
    "GET",
    "POST",
    "HEAD",
    "PUT",
    "PATCH",
    "DELETE",
    "OPTIONS",
    "TRACE",
    "PROPFIND",
    "get",
    "Post",
    "gEt",
)
BODY = json.dumps(chat("relay")).encode()


@pytest.fixture
def routes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Route]:
    """The route table as a worker builds it."""
    built: list[list[Route]] = []
    monkeypatch.setattr(app, "Gate", lambda routes, *_: built.append(routes))
    settings = Settings(server=Settings().server.__class__(data_dir=str(tmp_path)))

    async def ask(*_: object) -> None:
        raise AssertionError("no handler runs")

    def doubt(*_: object) -> None:
        raise AssertionError("no engine is asked")

    memory = SharedMemory.create(shared_cells(settings))
    keys = KeyTable([], bytes(32))
    reach = {"ask": ask, "repeats": Repeats(ask, doubt), "on_doubt": doubt}
    Application(settings, keys, memory, worker=0, wake_fds=[], my_fd=0, created=0, **reach)
    return built[0]


def private_paths(routes: list[Route]) -> list[str]:
    """Every place of a route that needs a key."""
    places = [
        prefix + route.path + ("/some-id" if route.takes_rest else "")
        for route in routes
        for prefix in route.prefixes
        if not route.public
    ]
    assert len(places) > 60
    return places


def variants(path: str) -> Iterator[str]:
    """Ways to write `path` that one server or another has taken for it, or for something public."""
    first, rest = path[1], path[2:]
    last = path.rpartition("/")[2]
    yield from (
        path,
        path + "/",
        path + "//",
        path + "?",
        path + "?x=/health",
        path + "?key=DSK-x",
        path + "#/health",
    )
    yield from (path.upper(), path.title(), path.swapcase(), "/" + first.upper() + rest)
    yield from ("/" + path, "///" + path[1:], path.replace("/", "//"), "/./" + path[1:], "/x/.." + path)
    yield from (
        path + ".",
        path + "..",
        path + "/.",
        path + "/..",
        path + "./",
        path + "...",
        path + "%20",
        path + " ",
    )
    yield from (
        path + ";",
        path + ";/health",
        path + ";.json",
        "/;" + path,
        path.replace("/", "/;/", 1),
        path + ".json",
    )
    yield from (
        f"/%{ord(first):02x}{rest}",
        f"/%{ord(first):02X}{rest}",
        f"/%25{ord(first):02x}{rest}",
        f"/%u00{ord(first):02x}{rest}",
    )
    yield from (
        "%2f" + path[1:],
        "/%2f" + path[1:],
        path.replace("/", "%2F"),
        path.replace("/", "/%2F"),
        path + "%2F",
        path + "%2f..%2fhealth",
    )
    yield from (
        path + "%2e",
        "/%2e" + path,
        "/%2e%2e" + path,
        "/health/%2e%2e" + path,
        "/health/.." + path,
        "/health/..;" + path,
    )
    yield from (
        path + "%00",
        path + "%00/health",
        path + "%0a",
        path + "%0d%0ahealth",
        path + "%09",
        path + "%c0%af",
        path + "%ff",
    )
    yield from (
        "/health" + path,
        "/health;" + path,
        "/health%2f.." + path,
        "/health%00" + path,
        "/health%3f" + path,
        "/v1/health/" + last,
    )
    yield from (
        path + "/../health",
        path + "/../../health",
        path + "/..%2f..%2fhealth",
        path + "/%2e%2e/%2e%2e/health",
    )
    yield from (
        path.replace("/", "\\"),
        "/\\" + path[1:],
        path + "\\",
        path + "\\..\\health",
        "\\" + path[1:],
    )
    yield from (
        "http://localhost" + path,
        "http://evil.example.com" + path,
        "https://localhost:1/health" + path,
        "//localhost" + path,
    )
    yield from (
        "http://health@localhost" + path,
        "http://[::1]" + path,
        "/health/http://localhost" + path,
        path[1:],
        "*" + path,
    )


TRICKS = [
    [],
    ["Host: evil.example.com"],
    ["Host: localhost/health"],
    ["Host: localhost", "Host: 127.0.0.1"],
    ["X-Original-URL: /health"],
    ["X-Rewrite-URL: /health"],
    ["X-Forwarded-Uri: /health", "X-Forwarded-Path: /health", "X-Forwarded-Prefix: /health"],
    ["X-HTTP-Method-Override: GET", "X-Method-Override: OPTIONS", "X-HTTP-Method: HEAD"],
    [
        "X-Forwarded-For: 127.0.0.1",
        "X-Real-IP: 127.0.0.1",
        "Forwarded: for=127.0.0.1",
        "X-Forwarded-Host: localhost",
    ],
    ["X-Forwarded-Proto: https", "X-Forwarded-Port: 443", "X-Forwarded-User: admin", "X-Remote-User: admin"],
    ["Origin: http://localhost", "Access-Control-Request-Method: GET", "Sec-Fetch-Site: same-origin"],
    [
        "Cookie: key=DSK-x; session=admin",
        "X-API-Key: DSK-x",
        "Api-Key: DSK-x",
        "Proxy-Authorization: Bearer DSK-x",
    ],
    ["Authorization:"],
    ["Authorization: Bearer"],
    ["Authorization: Bearer undefined"],
    ["Authorization: Basic YWRtaW46YWRtaW4="],
    ["Authorization: Bearer ' OR '1'='1' --"],
    ["Authorization: Bearer DSK-' OR 1=1 -- -{wrong}"],
    ["Authorization: Bearer {wrong}"],
    ["Authorization: Bearer {admin}x"],
    ["Authorization: bearer{admin}"],
    ["Authorization: Basic {admin}"],
    ["Authorization: {admin}"],
    ["Authorization: Bearer {admin},Bearer {admin}"],
    ["Authorization: Bearer {wrong}", "Authorization: Bearer {admin}"],
    ["Authorization: Bearer {admin}", "Authorization: Bearer {wrong}"],
    ["Authorization: Bearer {admin}", "Authorization: Bearer {admin}"],
    ["Authorization : Bearer {admin}"],
    ["X: y", " Authorization: Bearer {admin}"],
    ["X-Authorization: Bearer {admin}"],
    ["Authorization_: Bearer {admin}"],
    ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Key: x", "Sec-WebSocket-Version: 13"],
    ["Connection: close, authorization"],
    ["Expect: 100-continue"],
    ["X-API-Key:"],
    ["X-API-Key: {wrong}"],
    ["X-API-Key: {admin}x"],
    ["X-API-Key: Bearer {admin}"],
    ["X-API-Key: {admin},{admin}"],
    ["X-API-Key: {admin}", "X-API-Key: {admin}"],
    ["X-API-Key: {wrong}", "X-API-Key: {admin}"],
    ["X-API-Key: {admin}", "X-API-Key: {wrong}"],
    ["X-API-Key: {admin}", "Authorization: Bearer {wrong}"],
    ["X-API-Key: {wrong}", "Authorization: Bearer {admin}"],
    ["X-API-Key:", "Authorization: Bearer {admin}"],
    ["X-API-Key: {admin}", "Authorization:"],
    ["X-API-Key: {admin}", "Authorization: {admin}"],
    ["X-API-Key: {admin}", "Authorization: Basic {admin}"],
    ["X_API_Key: {admin}"],
    ["X-API-Key : {admin}"],
    ["Api-Key: {admin}"],
]


class Attempts:
    """Many requests, over as few connections as the service allows."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._wire: Wire | None = None
        self.made = 0

    def answer(self, data: bytes, *, head: bool = False) -> Answer:
        self.made += 1
        self._wire = self._wire or Wire(self._service.port)
        answer = self._wire.send(data).answer(head_only=head)
        if answer.headers.get("connection") == "close":
            self._wire.close()
            self._wire = None
        return answer


def check_refused(answer: Answer, what: object, *, head: bool = False) -> None:
    """A 401, or a 400 for what is no HTTP; neither says anything about what is there."""
    assert answer.status in (400, 401), (what, answer)
    if head:
        return
    error = answer.error
    assert error["type"] == ("authentication_error" if answer.status == 401 else "invalid_request_error"), (
        what
    )
    for word in ("route", "model", "/v1", "metrics", "admin", "chat", "relay"):
        assert word not in error["message"], (what, answer)


def lines(method: str, path: str, headers: list[str], version: str = "1.1") -> bytes:
    """A request with exactly these headers, and a body of length 0 where there is none of another."""
    host = [] if any(line.lower().startswith("host") for line in headers) else ["Host: localhost"]
    head = "\r\n".join([f"{method} {path} HTTP/{version}", *host, *headers, "Content-Length: 0"])
    return head.encode("latin-1") + b"\r\n\r\n"


def test_each_route_needs_a_key_by_every_method(relay: Service, routes: list[Route]):
    attempts = Attempts(relay)
    for path in private_paths(routes):
        for method in METHODS:
            head = method.upper() == "HEAD"
            check_refused(attempts.answer(lines(method, path, []), head=head), (method, path), head=head)
    assert attempts.made > 700


def test_no_way_of_writing_a_path_gets_around(relay: Service, routes: list[Route]):
    attempts = Attempts(relay)
    for path in private_paths(routes):
        for written in variants(path):
            for method in ("GET", "POST"):
                check_refused(attempts.answer(lines(method, written, [])), (method, written))
    assert attempts.made > 8000


def test_no_header_gets_around(relay: Service, routes: list[Route]):
    attempts = Attempts(relay)
    wrong = new_key()[1]
    for path in private_paths(routes):
        for trick in TRICKS:
            headers = [line.format(wrong=wrong, admin=relay.key) for line in trick]
            for version in ("1.0", "1.1"):
                check_refused(attempts.answer(lines("GET", path, headers, version)), (path, trick))
    assert attempts.made > 3000


def test_a_key_alone_in_a_header_of_its_own(relay: Service):
    """As clients of Anthropic's API send it."""
    alone, bearer = f"x-api-key: {relay.key}", f"Authorization: Bearer {relay.key}"
    token = relay.command("keys", "token", relay.new_key("anthropic")[4:16]).strip()
    for headers in ([alone], [alone, bearer], [bearer, alone], [f"X-Api-Key:   {relay.key} "]):
        assert call(relay.port, lines("GET", "/v1/models", headers)).status == 200
    assert call(relay.port, lines("GET", "/v1/models", [f"x-api-key: {token}"])).status == 200


def test_a_client_that_wants_the_connection_closed_sees_it_closed(relay: Service):
    for connection in ("close", "Close", "close, x", "x,close"):
        wire = Wire(relay.port).send(lines("GET", "/health", [f"Connection: {connection}"]))
        answer = wire.answer()
        assert (answer.status, answer.headers["connection"]) == (200, "close")
        assert wire.ended()


def test_a_role_opens_its_own_routes_only(relay: Service, routes: list[Route]):
    keys = {role: relay.new_key(role, "--role", role) for role in ("user", "metrics")}
    refused = 0
    for route in routes:
        for prefix in route.prefixes if not route.public else ():
            path = prefix + route.path + ("/some-id" if route.takes_rest else "")
            for role in keys.keys() - route.open_to:
                for method in METHODS[:7]:
                    data = lines(method, path, [f"Authorization: Bearer {keys[role]}"])
                    assert call(relay.port, data, head_only=method == "HEAD").status == 403, (
                        role,
                        method,
                        path,
                    )
                    refused += 1
    assert refused > 300


def test_what_is_public_says_little(relay: Service, routes: list[Route]):
    """The whole of it, so that nobody adds to it without seeing this."""
    answers = {}
    for route in routes:
        for prefix in route.prefixes if route.public else ():
            answer = call(relay.port, lines("GET", prefix + route.path, []))
            assert answer.status == 200
            answers[route.path] = set(answer.json())
            for method in ("POST", "PUT", "DELETE", "OPTIONS"):
                assert call(relay.port, lines(method, prefix + route.path, [])).status == 405
    assert set(answers) == PUBLIC
    assert answers == {
        "/health": {"status"},
        "/ready": {"status", "not_ready", "problems"},
        "/version": {"version"},
    }


def test_a_key_opens_its_own_request_and_no_other(relay: Service):
    """On one connection, sent at once: before, between and after requests with a good key."""
    good, none = request("GET", "/v1/models", b"", relay.key), request("GET", "/v1/models")
    wrong = request("GET", "/v1/models", b"", new_key()[1])
    wire = Wire(relay.port).send(none + good + none + good + wrong + good)
    assert [wire.answer().status for _ in range(6)] == [401, 200, 401, 200, 401, 200]


@pytest.mark.parametrize(
    "framing",
    [
        ["Content-Length: 4", "Transfer-Encoding: chunked"],
        ["Transfer-Encoding: chunked", "Content-Length: 4"],
        ["Content-Length: 4", "Content-Length: 5"],
        ["Content-Length: 4, 5"],
        ["Content-Length: +4"],
        ["Content-Length: 0x4"],
        ["Content-Length: -1"],
        ["Content-Length: 4 4"],
        ["Transfer-Encoding: xchunked"],
        ["Transfer-Encoding: chunked, identity"],
        ["Transfer-Encoding : chunked"],
        ["Transfer-Encoding:\x0bchunked"],
        ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
    ],
)
def test_no_second_request_is_smuggled_in_a_body(relay: Service, framing: list[str]):
    """Where proxies have disagreed about the end of a message, the connection ends with one refusal."""
    head = "\r\n".join(["POST /v1/models HTTP/1.1", "Host: localhost", *framing]).encode("latin-1")
    inner = request("GET", "/v1/models", b"", relay.key)
    wire = Wire(relay.port).send(head + b"\r\n\r\n0\r\n\r\n" + inner)
    assert wire.answer().status in (400, 401)
    assert wire.ended()


@pytest.mark.parametrize(
    "host",
    [
        "",
        "localhost",
        "evil.example.com",
        "127.0.0.1:1",
        "[::1]",
        "/health",
        "a" * 2000,
        "localhost, evil",
        "\x80\xff",
    ],
)
def test_the_host_decides_nothing(relay: Service, host: str):
    expected = call(relay.port, request("GET", "/v1/models", b"", relay.key)).body
    for target in ("/v1/models", "http://evil.example.com/v1/models", "http://[::1]:9/v1/models"):
        headers = [f"Host: {host}", f"Authorization: Bearer {relay.key}"]
        assert call(relay.port, lines("GET", target, headers)).body == expected
        assert call(relay.port, lines("GET", target, headers[:1])).status == 401
    no_host = f"GET /v1/models HTTP/1.1\r\nAuthorization: Bearer {relay.key}\r\n\r\n".encode()
    assert call(relay.port, no_host).body == expected


def test_every_answer_forbids_guessing_its_type(relay: Service):
    for path, key in (
        ("/health", None),
        ("/v1/models", None),
        ("/v1/models", relay.key),
        ("/metrics", relay.key),
    ):
        assert call(relay.port, request("GET", path, b"", key)).headers["x-content-type-options"] == "nosniff"
    for stream in (False, True):
        answer = call(
            relay.port, request("POST", "/v1/chat/completions", chat("relay", stream=stream), relay.key)
        )
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert call(relay.port, b"nonsense\r\n\r\n").headers["x-content-type-options"] == "nosniff"


# Fuzz: bytes that no client sends


def post(path: str, framing: str, body: bytes) -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{framing}\r\n\r\n".encode() + body


SEEDS = [
    lines("GET", "/v1/models", ["Accept: */*", "Authorization: Bearer DSK-x"]),
    lines("GET", "/metrics", ["Connection: close"]),
    post("/v1/chat/completions", f"Content-Length: {len(BODY)}", BODY),
    post("/admin/v1/keys", "Transfer-Encoding: chunked", b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)),
    lines("GET", "http://localhost/v1/models?x=%20", ["Cookie: a=b"]) * 3,
]
WORDS = (
    rb"""\r\n|\n|\r|\0| |\t|:|/|//|%2f|%|?|#|;|..|\\|\xff|\x80|HTTP/1.1|HTTP/1.0|HTTP/9.9|CONNECT |\x16\x03"""
)
PIECES = [
    *WORDS.decode("unicode_escape").encode("latin-1").split(b"|"),
    b"Transfer-Encoding: chunked\r\n",
    b"Content-Length: 5\r\n",
    b"Authorization: Bearer x\r\n",
    b"Connection: upgrade\r\nUpgrade: h2c\r\n",
    b"Expect: 100-continue\r\n",
    b"0\r\n\r\n",
    b"ffffffffffffffff\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"A" * 5000,
    b"x: y\r\n" * 2000,
]


def mutated(random: random.Random) -> bytes:
    data = bytearray(random.choice(SEEDS))
    for _ in range(random.randint(1, 6)):
        at = random.randrange(len(data) + 1)
        kind = random.randrange(5)
        if kind == 0:
            data[at:at] = random.choice(PIECES)
        elif kind == 1:
            data[at : at + random.randint(1, 20)] = b""
        elif kind == 2 and at < len(data):
            data[at] = random.randrange(256)
        elif kind == 3:
            data[at:at] = data[at : at + random.randint(1, 60)]
        else:
            del data[at:]
        data = data or bytearray(b"G")
    return bytes(data)


def responses(connection: socket.socket) -> tuple[bytes, bool]:
    """What comes until the service closes or has nothing more to say; and whether it said or did anything."""
    connection.settimeout(60)
    received = b""
    try:
        while data := connection.recv(65536):
            received += data
            connection.settimeout(0.05)
    except TimeoutError:
        return received, bool(received)
    except ConnectionResetError:
        pass
    return received, True


@pytest.mark.parametrize("seed", range(3))
def test_bytes_that_are_no_request(impatient: Service, seed: int):
    """Never a 500, never silence, never an answer from behind the gate; and the service goes on."""
    numbers = random.Random(seed)
    for _ in range(3):
        sent = [mutated(numbers) for _ in range(80)]
        connections = [socket.create_connection(("127.0.0.1", impatient.port), 60) for _ in sent]
        for connection, data in zip(connections, sent, strict=True):
            with suppress(BrokenPipeError, ConnectionResetError):  # refused before it was all sent
                connection.sendall(data)
        for connection, data in zip(connections, sent, strict=True):
            with connection:
                received, answered = responses(connection)
            assert answered, data
            statuses = {int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:]}
            assert statuses <= {100, 400, 401, 408, 413, 431}, (data, received)
    assert call(impatient.port, request("GET", "/v1/models", b"", impatient.key)).status == 200
    assert "Traceback" not in log_of(impatient)


# Addresses and pages of other sites, on a running service


NETWORK = """
[network]
allow = ["198.51.100.0/24"]
trusted_proxies = ["127.0.0.1"]
cors_origins = ["https://app.example.com"]
"""


@pytest.fixture(scope="module")
def behind_proxy(start, chat_upstream: ChatUpstream) -> Iterator[Service]:
    """A service whose clients come through a proxy at 127.0.0.1, which the tests are."""
    service = start(PATIENT + NETWORK + upstream_model("relay", chat_upstream), "--workers", "2")
    yield service
    assert service.stop() == 0


def from_address(service: Service, address: str | None, key: str | None, *headers: str) -> Answer:
    forwarded = [] if address is None else [f"X-Forwarded-For: {address}"]
    return call(service.port, request("GET", "/v1/models", b"", key, *forwarded, *headers))


def test_addresses_that_a_trusted_proxy_names(behind_proxy: Service):
    key = behind_proxy.key
    assert from_address(behind_proxy, "198.51.100.7", key).status == 200
    assert from_address(behind_proxy, "203.0.113.1, 198.51.100.7", key).status == 200
    for address in (None, "203.0.113.1", "198.51.100.7, 203.0.113.1", "unknown", ""):
        refused = from_address(behind_proxy, address, key)
        assert (refused.status, refused.error["code"]) == (403, "address_not_allowed")
        assert refused.error["type"] == "permission_error"


def test_a_key_and_a_token_with_networks_of_their_own(behind_proxy: Service):
    key = behind_proxy.new_key("near", "--allow", "198.51.100.0/28")
    token = behind_proxy.command("keys", "token", "near", "--allow", "198.51.100.4").strip()
    for address, by_key, by_token in (
        ("198.51.100.4", 200, 200),
        ("198.51.100.5", 200, 403),
        ("198.51.100.77", 403, 403),
    ):
        assert from_address(behind_proxy, address, key).status == by_key
        assert from_address(behind_proxy, address, token).status == by_token


def test_a_listed_page_may_call(behind_proxy: Service):
    headers = ["Origin: https://app.example.com", "X-Forwarded-For: 198.51.100.7"]
    asked = [*headers, "Access-Control-Request-Method: POST", "Access-Control-Request-Headers: authorization"]
    answer = call(behind_proxy.port, request("OPTIONS", "/v1/chat/completions", b"", None, *asked))
    assert (answer.status, answer.headers["access-control-allow-headers"]) == (200, "authorization")
    body = chat("relay", stream=True)
    streamed = call(
        behind_proxy.port, request("POST", "/v1/chat/completions", body, behind_proxy.key, *headers)
    )
    assert streamed.headers["access-control-allow-origin"] == "https://app.example.com"
    assert b"[DONE]" in streamed.body
