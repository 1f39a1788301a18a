"""Whatever is sent gets an answer in OpenAI's shape, and the service goes on as before."""

from __future__ import annotations

import json
import socket
import time
from contextlib import suppress

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.chat_upstream import ChatUpstream
from fakes.configs import CONTEXT, chat
from fakes.observe import engine_lives, memory
from fakes.service import Service
from fakes.wire import Answer, Wire, call, request, text_of

PATH = "/v1/chat/completions"
MEGABYTE = 1024 * 1024


def post(service: Service, body: object, *headers: str, path: str = PATH) -> Answer:
    return call(service.port, request("POST", path, body, service.key, *headers))


def answers(service: Service, model: str = "relay") -> bool:
    """Whether a request as it should be is answered as it should be."""
    return post(service, chat(model, max_tokens=2)).status == 200


# Bodies


def messages(content: str) -> bytes:
    return b'{"model": "relay", "messages": [{"role": "user", "content": %b}]}' % content.encode()


BAD_BODIES = {
    "empty": b"",
    "blank": b"  \n",
    "not-json": b"hello",
    "cut": b'{"model": "relay", "mess',
    "trailing": messages('"x"') + b"}",
    "two": messages('"x"') * 2,
    "array": b"[]",
    "null": b"null",
    "number": b"1e999999",
    "utf-8": b'{"model": "relay", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "utf-8-unknown-field": messages('"x"')[:-1] + b', "x": "\xc3"}',
    "utf-16": messages('"x"').decode().encode("utf-16"),
    "nul": b"\0" * 100,
    "nan": messages('"x"')[:-1] + b', "temperature": NaN}',
    "infinity": messages('"x"')[:-1] + b', "temperature": -Infinity}',
    "huge-number": messages('"x"')[:-1] + b', "max_tokens": 1' + b"0" * 5000 + b"}",
    "lone-surrogate": messages(r'"\ud800"'),
    "lone-low-surrogate": messages(r'"\udc00x"'),
    "surrogate-key": messages('"x"')[:-1] + rb', "\ud800": 1}',
    "deep-arrays": b"[" * 100_000 + b"]" * 100_000,
    "deep-objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "deep-unknown-field": messages('"x"')[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep-open": b"[" * MEGABYTE,
    "million-messages": b'{"model": "relay", "messages": ['
    + b",".join([b'{"role": "user", "content": ""}'] * 1_000_000)
    + b"]}",
    "number-content": messages("7"),
    "object-content": messages('{"x": 1}'),
    "no-messages": b'{"model": "relay", "messages": []}',
    "model-number": b'{"model": 7, "messages": [{"role": "user", "content": "x"}]}',
}


@pytest.mark.parametrize("body", BAD_BODIES.values(), ids=list(BAD_BODIES))
def test_bodies_that_are_no_request(relay: Service, body: bytes):
    answer = post(relay, body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 10**9),
        ("n", -1),
        ("n", 0),
        ("max_tokens", -5),
        ("max_tokens", 0),
        ("max_completion_tokens", 2**63),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.5),
        ("presence_penalty", -3),
        ("frequency_penalty", 3),
        ("seed", 2**64),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("stop", 5),
        ("stop", [""]),
        ("stream", "yes"),
        ("stream", 1),
        ("top_logprobs", 21),
        ("response_format", {"type": "xml"}),
        ("response_format", "json_object"),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", "x"),
        ("metadata", {"k": 5}),
        ("user", 5),
    ],
)
def test_wrong_values_name_their_field(relay: Service, field: str, value: object):
    answer = post(relay, {**chat("relay"), field: value})
    assert answer.status == 400
    assert (answer.error["param"] or "").startswith(field)
    assert field in answer.error["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_longer_than_the_context(service: Service, stream: bool):
    content = "one two three four " * CONTEXT
    counted = post(service, {"content": content}, path="/tokenize").json()["count"]
    answer = post(service, chat("tiny", content, stream=stream))
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    numbers = [int(word) for word in answer.error["message"].replace(".", "").split() if word.isdigit()]
    assert numbers[0] == CONTEXT
    assert counted < numbers[1] < counted + 100  # the template adds its own


@pytest.mark.parametrize("body", [chat("tiny", " " * 30 * MEGABYTE), {"content": " " * 30 * MEGABYTE}])
def test_a_prompt_far_longer_than_the_context_costs_nothing(service: Service, body: object):
    """Tokenising this would take the engine a minute and seven gigabytes."""
    began = time.monotonic()
    answer = post(service, body, path=PATH if "messages" in body else "/tokenize")
    assert (answer.status, answer.error["code"]) == (400, "context_length_exceeded")
    assert f"{CONTEXT} tokens" in answer.error["message"]
    assert "at least 122880 tokens" in answer.error["message"] or "messages" in body
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("count", ["minItems", "maxItems", "minLength", "maxLength"])
def test_a_schema_that_would_take_all_memory(service: Service, count: str):
    kind = {"type": "array", "items": {"type": "string"}} if "Items" in count else {"type": "string"}
    schema = {"type": "object", "properties": {"x": {**kind, count: 100_000_000}}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    before = engine_lives(service)
    answer = post(service, chat("tiny", response_format=form, max_tokens=4))
    assert (answer.status, answer.error["param"].rpartition(".")[2]) == (400, count)
    assert engine_lives(service) == before


@pytest.mark.parametrize("path", [PATH, "/v1/completions", "/v1/embeddings"])
def test_an_unknown_model_lists_the_known(relay: Service, path: str):
    body = {**chat("gpt-17"), "prompt": "x", "input": "x"}
    answer = post(relay, body, path=path)
    assert (answer.status, answer.error["code"], answer.error["param"]) == (404, "model_not_found", "model")
    assert "relay" in answer.error["message"]
    assert "capped" in answer.error["message"]


@pytest.mark.parametrize("name", ["x" * 100_000, "\u0000", "{x!r}", "\r\nx: y", "❤"])
def test_odd_model_names(relay: Service, name: str):
    assert post(relay, chat(name)).status == 404


# Bodies that are too large


def send_until_refused(wire: Wire, data: bytes, times: int) -> int:
    """Send `data` again and again; returns how often it went out before the server closed."""
    for count in range(times):
        try:
            wire.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return count
    return times


def test_a_large_body_is_refused_without_being_read(relay: Service):
    [worker] = relay.workers()
    before = memory(worker)
    head = request("POST", PATH, b"", relay.key).replace(b"Length: 0", b"Length: %d" % (100 * MEGABYTE))
    with Wire(relay.port) as wire:
        sent = send_until_refused(wire.send(head), bytes(MEGABYTE), 100)
        answer = wire.answer()
        assert wire.ended()
    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert sent < 32
    assert memory(worker) - before < 16 * MEGABYTE


def test_a_large_chunked_body_is_refused_at_the_cap(relay: Service):
    chunk = b"%x\r\n%b\r\n" % (MEGABYTE, bytes(MEGABYTE))
    with Wire(relay.port) as wire:
        wire.send(request("POST", PATH, b"", relay.key, "Transfer-Encoding: chunked"))
        sent = send_until_refused(wire, chunk, 100)
        answer = wire.answer()
    assert answer.status == 413
    assert 32 <= sent < 64


def test_a_large_body_without_a_key_is_not_read_at_all(relay: Service):
    with Wire(relay.port) as wire:
        wire.send(request("POST", PATH, b"", None, "Transfer-Encoding: chunked"))
        sent = send_until_refused(wire, b"%x\r\n%b\r\n" % (MEGABYTE, bytes(MEGABYTE)), 100)
        assert wire.answer().status == 401
    assert sent < 16


def test_a_client_that_sends_all_before_it_reads_sees_the_refusal(relay: Service):
    """As most HTTP libraries do; the refusal must survive until they look."""
    with relay.client() as http:
        assert http.post(PATH, content=bytes(100 * MEGABYTE)).status_code == 413


# Who may do what


def test_keys(relay: Service):
    bodies = request("POST", PATH, chat("relay"), None)
    answer = call(relay.port, bodies)
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")
    assert "www-authenticate" in answer.headers
    wrong = relay.key[:-1] + ("x" if relay.key[-1] != "x" else "y")
    other = "DSK-" + "a" * 12 + relay.key[16:]
    for key in (wrong, other, "", "DSK-", relay.key + "x", relay.key[:-1], "sk-123", "\xe9" * 60, "x" * 9000):
        answer = call(relay.port, request("POST", PATH, chat("relay"), key))
        assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
        assert wrong not in answer.error["message"]
    basic = request("POST", PATH, chat("relay"), None, f"Authorization: Basic {relay.key}")
    assert call(relay.port, basic).status == 401


@pytest.mark.parametrize("path", ["/v1/nothing", "/", "/v1/chat", "/v1/%ff%00", "/%2e%2e/etc/passwd", "//"])
def test_unknown_routes(relay: Service, path: str):
    assert call(relay.port, request("GET", path)).status == 401
    answer = call(relay.port, request("GET", path, b"", relay.key))
    assert (answer.status, answer.error["type"]) == (404, "not_found_error")


def test_wrong_methods(relay: Service):
    for method, path, allowed in (
        ("GET", PATH, "POST"),
        ("DELETE", PATH, "POST"),
        ("OPTIONS", PATH, "POST"),
        ("POST", "/v1/models", "GET"),
        ("PUT", "/v1/models/relay", "GET"),
        ("PATCH", "/health", "GET"),
    ):
        answer = call(relay.port, request(method, path, b"", relay.key))
        assert (answer.status, answer.headers["allow"]) == (405, allowed), (method, path)
        assert answer.error["code"] == "method_not_allowed"


def test_head(relay: Service):
    with Wire(relay.port) as wire:
        for path, status in (("/health", 200), ("/v1/models", 200), ("/nothing", 404)):
            head = wire.send(request("HEAD", path, b"", relay.key)).answer(head_only=True)
            assert (head.status, int(head.headers["content-length"]) > 0) == (status, True)
        assert wire.send(request("GET", "/health")).answer().json() == {"status": "ok"}


# HTTP itself

MALFORMED = {
    "text": b"hello there\r\n\r\n",
    "tls": bytes.fromhex("16030100f8010000f40303") + bytes(range(200)),
    "http2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version": b"GET /health HTTP/9.9\r\n\r\n",
    "no-path": b"GET  HTTP/1.1\r\n\r\n",
    "raw-bytes-in-path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "control-in-header": b"GET /health HTTP/1.1\r\nHost: x\r\nA: \x01\x00\r\n\r\n",
    "space-before-colon": b"GET /health HTTP/1.1\r\nHost : x\r\n\r\n",
    "no-colon": b"GET /health HTTP/1.1\r\nHost\r\n\r\n",
    "bare-lf-smuggle": b"POST /health HTTP/1.1\r\nA: b\nTransfer-Encoding: chunked\r\n\r\n",
    "two-lengths": b"POST /health HTTP/1.1\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "length-and-chunked": b"POST /health HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n",
    "negative-length": b"POST /health HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    "length-overflow": b"POST /health HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n",
    "bad-chunk": b"POST /health HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "tunnel": b"CONNECT example.com:443 HTTP/1.1\r\nHost: example.com\r\n\r\n",
    "lower-case-unknown": b"frob /health HTTP/1.1\r\n\r\n",
}


@pytest.mark.parametrize("data", MALFORMED.values(), ids=list(MALFORMED))
def test_malformed_http(relay: Service, data: bytes):
    with Wire(relay.port) as wire:
        answer = wire.send(data).answer()
        assert (answer.status, answer.headers["connection"]) in ((400, "close"), (405, "close"))
        assert answer.error["type"] == "invalid_request_error"
        assert wire.ended()


def test_oversize_headers(relay: Service):
    for data in (
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 10_000_000,
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
    ):
        with Wire(relay.port) as wire:
            send_until_refused(wire, data, 1)
            answer = wire.answer()
            assert (answer.status, answer.error["code"]) == (431, "headers_too_large")


def test_a_request_split_at_every_byte(relay: Service):
    data = request("Post", "/tokenize", {"content": "x", "model": "nobody"}, relay.key)
    with Wire(relay.port) as wire:
        for cut in range(1, len(data)):
            wire.send(data[:cut])
            time.sleep(0.001)
            assert wire.send(data[cut:]).answer().status == 404, data[:cut]
        for byte in data:
            wire.send(bytes([byte]))
            time.sleep(0.001)
        assert wire.answer().status == 404


def test_any_spelling_of_a_method(relay: Service):
    with Wire(relay.port) as wire:
        for method in ("Post", "post", "pOST"):
            assert wire.send(request(method, PATH, chat("relay"), relay.key)).answer().status == 200
        assert wire.send(request("get", "/health")).answer().status == 200


def test_pipelined_requests_are_answered_in_order(relay: Service, upstream: ChatUpstream):
    one = request("POST", PATH, chat("relay", stream=True), relay.key)
    two = request("GET", "/v1/models/relay", b"", relay.key)
    three = request("POST", PATH, chat("nobody"), relay.key)
    with Wire(relay.port) as wire:
        wire.send((one + two + three) * 5)
        for _ in range(5):
            assert text_of(wire.answer().body) == "hello"
            assert wire.answer().json()["id"] == "relay"
            assert wire.answer().status == 404


def test_the_next_request_may_begin_while_one_is_answered(relay: Service, upstream: ChatUpstream):
    data = request("POST", PATH, chat("relay"), relay.key)
    for cut in (1, 3, 20, len(data) - 5):
        with Wire(relay.port) as wire:
            wire.send(data + data[:cut])
            assert wire.answer().status == 200
            wire.send(data[cut:])
            assert wire.answer().status == 200, cut


def test_http_1_0(relay: Service):
    """An old proxy, say: no chunks, and the end of the connection is the end of the answer."""
    for stream in (False, True):
        with Wire(relay.port) as wire:
            wire.send(request("POST", PATH, chat("relay", stream=stream), relay.key, version="1.0"))
            answer = wire.answer()
            assert answer.status == 200
            assert "transfer-encoding" not in answer.headers
            assert wire.ended()
        if stream:
            assert text_of(answer.body) == "hello"
        else:
            assert answer.json()["choices"]


def test_expect_100_continue(relay: Service):
    body = json.dumps(chat("relay")).encode()
    head = request("POST", PATH, body, relay.key, "Expect: 100-continue").removesuffix(body)
    with Wire(relay.port) as wire:
        assert wire.send(head).answer().status == 100
        assert wire.send(body).answer().status == 200
        assert wire.send(request("GET", "/health")).answer().status == 200


def test_expect_100_continue_is_not_given_to_the_unknown(relay: Service):
    head = request("POST", PATH, b"", None, "Expect: 100-continue").replace(b"Length: 0", b"Length: 10")
    with Wire(relay.port) as wire:
        assert wire.send(head).answer().status == 401
        assert wire.ended()


def test_an_offer_to_upgrade_is_declined(relay: Service):
    """curl --http2 offers it with every request; so do browsers' websockets."""
    for upgrade in ("h2c", "websocket"):
        offer = ("Connection: Upgrade", f"Upgrade: {upgrade}", "Sec-WebSocket-Key: AAAA")
        with Wire(relay.port) as wire:
            wire.send(request("POST", PATH, chat("relay"), relay.key, *offer))
            assert wire.answer().status == 200
            wire.send(request("GET", "/health", b"", None, *offer) * 2)
            assert [wire.answer().status for _ in range(2)] == [200, 200]
            data = request("POST", PATH, b"", relay.key, "Transfer-Encoding: chunked", *offer)
            for byte in data + b"3c\r\n" + b" " * 60 + b"\r\n0\r\n\r\n":
                wire.send(bytes([byte]))
            assert wire.answer().error["message"].startswith("The body is empty")


def test_a_client_may_leave_at_any_byte(relay: Service, upstream: ChatUpstream):
    data = request("POST", PATH, chat("relay"), relay.key)
    for cut in range(0, len(data), 3):
        with Wire(relay.port) as wire:
            wire.send(data[:cut])
        wire = Wire(relay.port)
        wire.send(data[:cut])
        wire.reset()
    assert answers(relay)


# Slow clients. The impatient service waits a second for headers and for bodies.


def drip(wire: Wire, data: bytes, seconds: float = 0.1) -> Answer:
    """Send a byte now and then until an answer comes."""
    wire.socket.settimeout(seconds)
    for byte in data:
        wire.send(bytes([byte]))
        try:
            if wire.socket.recv(1, socket.MSG_PEEK):
                break
        except TimeoutError:
            continue
    wire.socket.settimeout(60)
    return wire.answer()


SLOW = {
    "nothing": b"",
    "headers": b"GET /health HTTP/1.1\r\nX: " + b"x" * 200,
    "first-line": b"GET /" + b"x" * 200,
    "method": b"POST",
}


@pytest.mark.parametrize("data", SLOW.values(), ids=list(SLOW))
def test_slow_headers(impatient: Service, data: bytes):
    with Wire(impatient.port) as wire:
        began = time.monotonic()
        answer = drip(wire, data)
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert wire.ended()
        assert time.monotonic() - began > 0.9


@pytest.mark.parametrize("coding", ["Content-Length: 300", "Transfer-Encoding: chunked"])
def test_slow_bodies(impatient: Service, coding: str):
    head = request("POST", PATH, b"", impatient.key, coding).replace(b"Content-Length: 0\r\n", b"")
    with Wire(impatient.port) as wire:
        wire.send(head)
        answer = drip(wire, b"12c\r\n" + b" " * 250)
        assert (answer.status, answer.error["code"]) == (408, "request_timeout")
        assert wire.ended()


def test_slow_second_request(impatient: Service):
    with Wire(impatient.port) as wire:
        assert wire.send(request("GET", "/health")).answer().status == 200
        assert drip(wire, b"GET /health HTTP/1.1\r\nX: " + b"x" * 100).status == 408


def test_a_client_may_think_between_requests(impatient: Service):
    with Wire(impatient.port) as wire:
        assert wire.send(request("GET", "/health")).answer().status == 200
        time.sleep(2.5)
        assert wire.send(request("GET", "/health")).answer().status == 200


def test_the_slow_do_not_hold_up_others(relay: Service):
    """They have ten seconds for their headers, and are all there when another one is answered."""
    slow = [Wire(relay.port).send(b"GET /health HT") for _ in range(100)]
    assert call(relay.port, request("GET", "/health")).status == 200
    for wire in slow:
        assert wire.send(b"TP/1.1\r\n\r\n").answer().status == 200
        wire.close()


# Everything else

TOKENS = [b"{", b"}", b"[", b"]", b'"', b":", b",", b"\\u", b"null", b"1e9", b"model", b"messages", b"role"]
CRLF = b"\r\n"
LINES = [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"Connection: close", b"Expect: 100-continue"]

soup = st.lists(st.sampled_from(TOKENS) | st.binary(max_size=8), max_size=40).map(b"".join)
lines = st.lists(st.sampled_from(LINES) | st.binary(max_size=30), max_size=6).map(CRLF.join)
methods = st.sampled_from([b"POST", b"Post", b"GET", b"HEAD", b"FROB", b"\0"]) | st.binary(max_size=5)
paths = st.sampled_from([PATH.encode(), b"/v1/completions", b"/tokenize", b"/health", b"*"]) | st.binary(
    max_size=9
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    method=methods, path=paths, headers=lines, body=soup, well_formed=st.booleans(), cut=st.integers(0, 300)
)
def test_anything_at_all(
    relay_service: Service,
    method: bytes,
    path: bytes,
    headers: bytes,
    body: bytes,
    well_formed: bool,
    cut: int,
):
    """Well-formed HTTP gets an answer of below 500; anything else an answer or the end of the connection."""
    if well_formed:
        data = request("POST", PATH, body, relay_service.key)
    else:
        bearer = b"Authorization: Bearer " + relay_service.key.encode()
        data = method + b" " + path + b" HTTP/1.1\r\n" + CRLF.join([bearer, headers, b"", body])
    with Wire(relay_service.port) as wire:
        if not well_formed:
            with suppress(ConnectionError):  # refused before it was all sent
                wire.send(data[:cut])
                wire.send(data[cut:])
            with suppress(OSError):
                wire.socket.shutdown(socket.SHUT_WR)
            with suppress(ConnectionError):
                while data := wire.socket.recv(65536):
                    assert b" 500 " not in data[:16]
            return
        answer = wire.send(data[:cut]).send(data[cut:]).answer()
    assert 400 <= answer.status < 500
    assert answer.error["type"]


def test_after_all_this_it_answers(service: Service, relay: Service, upstream: ChatUpstream):
    assert answers(service, "tiny")
    assert answers(relay)
