"""Any OpenAI-compatible server can stand behind the gateway, in good days and bad ones."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from fakes.chat_upstream import (
    ANSWER,
    DONE,
    STREAM_HEAD,
    USAGE,
    ChatUpstream,
    Play,
    event,
    frame,
    one_by_one,
    replying,
    streaming,
    usage_event,
)
from fakes.configs import PATIENT, UPSTREAM_KEY, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.observe import log_of, metrics, ready
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request, sse, text_of


def post(service: Service, body: object, path: str = "/v1/chat/completions") -> Answer:
    return call(service.port, request("POST", path, body, service.key))


def stream(service: Service, **more: object) -> Answer:
    return post(service, chat("relay", stream=True, **more))


# What goes up


def test_the_model_is_mapped_and_our_key_sent_not_the_clients(relay: Service, upstream: ChatUpstream):
    assert post(relay, chat("relay")).status == 200
    sent = upstream.request()
    assert sent.path == "/v1/chat/completions"
    assert json.loads(sent.body)["model"] == "their-model"
    assert sent.headers["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert relay.key not in str(sent)


def test_unknown_fields_are_forwarded_verbatim(relay: Service, upstream: ChatUpstream):
    exact = '{"deep": [1.50, 1e400, "\\u00e9\\n", null, {"x":  true}]}'
    body = json.dumps(chat("relay"))[:-1] + f', "their_option": {exact}' + "}"
    assert post(relay, body.encode()).status == 200
    assert exact.encode() in upstream.request().body


@pytest.mark.parametrize("twin", ["model", "Model", "MODEL", "\\u006dodel", "mo\\u0064el"])
def test_no_second_model_is_smuggled(relay: Service, upstream: ChatUpstream, twin: str):
    for pair in (f'"{twin}": "secret", "model": "relay"', f'"model": "relay", "{twin}": "secret"'):
        body = "{" + pair + ', "messages": [{"role": "user", "content": "x"}]}'
        answer = post(relay, body.encode())
        if answer.status == 404:
            assert "secret" in answer.error["message"]
            continue
        keys = [key for key, _ in json.loads(upstream.request().body, object_pairs_hook=list)]
        assert [key for key in keys if key.lower() == "model"] == ["model"]
        assert answer.status == 200


def test_duplicate_messages_are_checked_and_sent_as_one(relay: Service, upstream: ChatUpstream):
    body = b'{"messages": "evil", "model": "relay", "messages": [{"role": "user", "content": "x"}]}'
    answer = post(relay, body)
    if answer.status == 200:
        assert upstream.request().body.count(b'"messages"') == 1
    else:
        assert answer.status == 400


# What comes down


def test_an_answer_passes_byte_by_byte(relay: Service, upstream: ChatUpstream):
    odd = (
        b'{ "choices":[ ],\n "usage" : {"prompt_tokens":1e0, "completion_tokens": 2},"\\u0078":"\xc3\xa9"}  '
    )
    odd = odd.replace(b"1e0", b"1")
    upstream.play(replying(ok(odd)))
    answer = post(relay, chat("relay"))
    assert (answer.status, answer.body) == (200, odd)
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]


def test_embeddings_and_legacy_completions(relay: Service, upstream: ChatUpstream):
    vectors = b'{"object":"list","data":[{"embedding":[1,2]}],"usage":{"prompt_tokens":4,"total_tokens":4}}'
    upstream.play(replying(ok(vectors)))
    assert post(relay, {"model": "relay", "input": "x"}, "/v1/embeddings").body == vectors
    assert upstream.request().path == "/v1/embeddings"
    upstream.play(replying(ok(ANSWER)))
    assert post(relay, {"model": "relay", "prompt": "x"}, "/v1/completions").body == ANSWER
    assert upstream.request().path == "/v1/completions"


def test_usage_is_asked_for_and_hidden(relay: Service, upstream: ChatUpstream):
    upstream.play(streaming(event("a"), event("b"), usage_event(), DONE))
    answer = stream(relay)
    assert json.loads(upstream.request().body)["stream_options"] == {"include_usage": True}
    assert answer.body == event("a") + event("b") + DONE


def test_usage_is_shown_to_those_who_ask(relay: Service, upstream: ChatUpstream):
    whole = event("a") + usage_event() + DONE
    upstream.play(streaming(whole))
    assert stream(relay, stream_options={"include_usage": True}).body == whole


def test_usage_is_counted(relay: Service, upstream: ChatUpstream):
    def tokens() -> tuple[float, ...]:
        found = metrics(relay)
        kinds = ("prompt", "completion")
        return tuple(
            found.get(f'deepseek_tokens_total{{kind="{kind}",model="counted"}}', 0) for kind in kinds
        )

    assert tokens() == (0, 0)
    assert post(relay, chat("counted")).status == 200
    upstream.play(streaming(event("a"), usage_event(), DONE))
    assert post(relay, chat("counted", stream=True)).status == 200
    expected = (2 * USAGE["prompt_tokens"], 2 * USAGE["completion_tokens"])
    eventually(lambda: tokens() == expected, what=f"counted {expected}")


def test_a_text_that_looks_like_the_protocol_is_only_text(relay: Service, upstream: ChatUpstream):
    texts = ["data: [DONE]", '"usage": {}', '{"usage": {"prompt_tokens": 9}}', 'data: {"error": 1}', "\r\n\n"]
    parts = [event(text) for text in texts]
    for play in (streaming, one_by_one):
        upstream.play(play(*parts, usage_event(), DONE))
        assert text_of(stream(relay).body) == "".join(texts)


def test_line_ends_of_any_kind(relay: Service, upstream: ChatUpstream):
    whole = event("a") + event("b") + usage_event() + DONE
    upstream.play(streaming(whole.replace(b"\n", b"\r\n")))
    answer = stream(relay)
    assert text_of(answer.body) == "ab"


def test_done_without_a_space_or_with_a_comment_before(relay: Service, upstream: ChatUpstream):
    upstream.play(streaming(b": hi\n\n" + event("a") + b"data:[DONE]\n\n"))
    answer = stream(relay)
    assert b'"a"' in answer.body
    assert b"error" not in answer.body


@pytest.mark.parametrize("crlf", [False, True])
def test_events_split_at_every_byte(relay: Service, upstream: ChatUpstream, crlf: bool):
    """One stream for every place where the network may cut; a cut in three for good measure."""
    whole = event("é1") + usage_event() + DONE
    if crlf:
        whole = whole.replace(b"\n", b"\r\n")
    cuts = iter(range(1, len(whole)))

    async def play(peer: Peer, _: Request) -> None:
        cut = next(cuts)
        await peer.send(STREAM_HEAD + frame(whole[:cut]))
        await asyncio.sleep(0.002)  # so that it is another read
        await peer.send(frame(whole[cut:]) + b"0\r\n\r\n")

    upstream.play(play)
    with httpx.Client(base_url=relay.url, headers={"authorization": f"Bearer {relay.key}"}) as http:
        for cut in range(1, len(whole)):
            body = http.post("/v1/chat/completions", json=chat("relay", stream=True)).content
            assert text_of(body) == "é1", cut
            assert b"usage" not in body, cut


def late(service: Service, upstream: ChatUpstream, answer: Play, stream: bool) -> tuple[int, bytes]:
    """Status and body where the upstream says nothing before the client has seen two keep-alives."""
    seen = asyncio.Event()

    async def play(peer: Peer, sent: Request) -> None:
        await seen.wait()
        await answer(peer, sent)

    upstream.play(play)
    body = chat("relay", stream=stream)
    with Wire(service.port) as wire:
        status, _ = wire.send(request("POST", "/v1/chat/completions", body, service.key)).head()
        early = wire.chunk() + wire.chunk()
        assert early == (b": keep-alive\n\n" if stream else b"\n") * 2
        upstream.run(seen.set)
        return status, early + b"".join(iter(wire.chunk, b""))


def test_a_slow_upstream_is_bridged_with_keep_alives(impatient: Service, upstream: ChatUpstream):
    assert text_of(late(impatient, upstream, streaming(event("late"), DONE), True)[1]) == "late"
    assert json.loads(late(impatient, upstream, replying(ok(ANSWER)), False)[1]) == json.loads(ANSWER)


# When it goes wrong


@pytest.mark.parametrize(
    ("status", "becomes", "type"),
    [
        (400, 400, "invalid_request_error"),
        (401, 502, "server_error"),
        (403, 502, "server_error"),
        (404, 502, "server_error"),
        (422, 400, "invalid_request_error"),
        (429, 429, "rate_limit_error"),
        (500, 502, "server_error"),
        (502, 502, "server_error"),
        (503, 503, "server_error"),
    ],
)
@pytest.mark.parametrize("streams", [False, True])
def test_errors_of_the_upstream(
    relay: Service, upstream: ChatUpstream, status: int, becomes: int, type: str, streams: bool
):
    said = b'{"error": {"message": "their words", "type": "t", "param": null, "code": null}}'
    upstream.play(replying(ok(said, "Retry-After: 17", status=f"{status} No")))
    answer = stream(relay) if streams else post(relay, chat("relay"))
    assert answer.status == becomes
    assert answer.error["type"] == type
    if status in (401, 403):
        assert UPSTREAM_KEY not in answer.error["message"]
    else:
        assert "their words" in answer.error["message"]
    if becomes == 429:
        assert answer.headers["retry-after"] == "17"
    if becomes == 503:
        assert int(answer.headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    "said", [b"<html>oops</html>", b"", b'"text"', b'{"error": "plain"}', b"\xff", b"[[]]"]
)
def test_errors_in_any_shape(relay: Service, upstream: ChatUpstream, said: bytes):
    upstream.play(replying(ok(said, status="500 Oops")))
    assert post(relay, chat("relay")).error["type"] == "server_error"


@pytest.mark.parametrize("said", [b"<html>fine</html>", b"", b"\xff", b"[]", b'{"choices": [}'])
def test_an_answer_that_is_none(relay: Service, upstream: ChatUpstream, said: bytes):
    upstream.play(replying(ok(said)))
    answer = post(relay, chat("relay"))
    assert answer.status == 502
    assert answer.error["code"] == "engine_failed"


@pytest.mark.parametrize(
    "bad",
    [
        streaming(event("a"), end=False),
        one_by_one(event("a")),
        one_by_one(event("a"), b'data: {"choices'),
        one_by_one(event("a"), b'data: {"error": {"message": "boom"}}\n\n'),
        one_by_one(event("a"), b'data: {"error": {"message": "boom"}}\n\n', DONE),
        one_by_one(event("a"), b'data: {"choices": [], "usage": {"prompt_tokens": "x"}}\n\n', DONE),
    ],
    ids=["dies", "no-done", "half-event", "error", "error-then-done", "bad-usage"],
)
def test_a_broken_stream_ends_with_an_error_event(relay: Service, upstream: ChatUpstream, bad: object):
    upstream.play(bad)
    *chunks, last = sse(stream(relay).body)
    assert [json.loads(chunk)["choices"][0]["delta"]["content"] for chunk in chunks] == ["a"]
    assert json.loads(last)["error"]["type"] == "server_error"


def test_an_upstream_that_dies_before_its_answer(relay: Service, upstream: ChatUpstream):
    async def play(peer: Peer, _: Request) -> None:
        peer.reset()

    upstream.play(play)
    answer = post(relay, chat("relay"))
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1


def test_an_answer_cut_short(relay: Service, upstream: ChatUpstream):
    async def play(peer: Peer, _: Request) -> None:
        await peer.send(ok(ANSWER)[:-10])
        peer.writer.close()

    upstream.play(play)
    assert post(relay, chat("relay")).error["code"] == "engine_failed"


def test_an_answer_for_the_impatient_turns_into_an_error(impatient: Service, upstream: ChatUpstream):
    """After the first keep-alive the status is out: the error is then the body, or an event."""
    oops = replying(ok(b"{}", status="500 Oops"))
    status, body = late(impatient, upstream, oops, False)
    assert (status, json.loads(body)["error"]["type"]) == (200, "server_error")
    status, body = late(impatient, upstream, oops, True)
    *_, last = sse(body)
    assert (status, json.loads(last)["error"]["type"]) == (200, "server_error")


def test_readiness_follows_the_upstream(start, chat_upstream: ChatUpstream):
    """Its own upstream, since this one leaves."""
    own = ChatUpstream()
    try:
        service = start(PATIENT + upstream_model("relay", own))
        assert ready(service) == 200
        own.health = 401
        eventually(lambda: ready(service) == 503, what="not ready with a refused key")
        own.health = 200
        eventually(lambda: ready(service) == 200, what="ready again")
    finally:
        own.close()
    answer = post(service, chat("relay"))
    assert answer.status == 503
    assert int(answer.headers["retry-after"]) >= 1
    assert "Traceback" not in log_of(service)
    assert service.stop() == 0
