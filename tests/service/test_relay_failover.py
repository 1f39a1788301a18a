"""A chat upstream fails: another one answers, or goes on, or the client is told."""

from __future__ import annotations

import json
import queue
from collections.abc import Iterator
from contextlib import suppress

import pytest

from fakes.chat_upstream import ANSWER, DONE, ChatUpstream, event, replying, streaming, usage_event
from fakes.configs import PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.observe import watched
from fakes.service import Service
from fakes.wire import Answer, call, request, sse, text_of

PATH = "/v1/chat/completions"
OPENING = b'data: {"id":"y","choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}\n\n'


@pytest.fixture(scope="module")
def upstreams() -> Iterator[list[ChatUpstream]]:
    made = [ChatUpstream(), ChatUpstream()]
    yield made
    for upstream in made:
        upstream.close()


@pytest.fixture(scope="module")
def two_upstreams(start, upstreams: list[ChatUpstream]) -> Service:
    def second(**more: object) -> str:
        """A table of a second engine for the model above it."""
        return upstream_model("x", upstreams[1], **more).split('name = "x"')[1]

    config = upstream_model("pair", upstreams[0]) + second()
    config += upstream_model("capped", upstreams[0], concurrency=4) + second(concurrency=4)
    config += upstream_model("continuing", upstreams[0]) + second(prefix_continuation="true")
    absent = '[[models.engines]]\nkind = "openai"\nbase_url = "http://127.0.0.1:9/v1"\n'
    config += f'[[models]]\nname = "away"\nfallback = ["absent", "capped"]\nready_timeout = 0.1\n{absent}'
    config += f'[[models]]\nname = "absent"\n{absent}'
    return start(PATIENT + config)


@pytest.fixture
def pair(two_upstreams: Service) -> Iterator[Service]:
    yield from watched(two_upstreams)


def post(service: Service, model: str, **more: object) -> Answer:
    return call(service.port, request("POST", PATH, chat(model, **more), service.key))


async def gone(peer: Peer, _: Request) -> None:
    """Takes the request, and closes without a word."""
    peer.writer.close()


BROKEN = {
    "says nothing": gone,
    "fails": replying(ok(b'{"error": {"message": "out of memory"}}', status="500 Oops")),
    "is overloaded": replying(ok(b"{}", status="429 Slow down")),
    "is away": replying(ok(b"{}", status="503 Later")),
    "refuses our key": replying(ok(b"{}", status="401 No")),
    "breaks off before the first event": streaming(b": hi", end=False),
    "ends before the first event": streaming(b""),
}


@pytest.mark.parametrize("model", ["pair", "capped"])
@pytest.mark.parametrize("play", BROKEN.values(), ids=BROKEN.keys())
def test_another_one_answers_what_has_not_begun(
    pair: Service, upstreams: list[ChatUpstream], play, model: str
):
    for broken, healthy in ((0, 1), (1, 0)):
        upstreams[broken].play(play)
        upstreams[healthy].play(streaming(event("hello"), usage_event(), DONE))
        answer = post(pair, model, stream=True)
        assert (answer.status, text_of(answer.body)) == (200, "hello")
        upstreams[healthy].play(replying(ok(ANSWER)))
        if play not in (BROKEN["breaks off before the first event"], BROKEN["ends before the first event"]):
            assert json.loads(post(pair, model).body) == json.loads(ANSWER)


def test_who_asks_wrongly_hears_it_from_the_first(pair: Service, upstreams: list[ChatUpstream]):
    for upstream in upstreams:
        upstream.play(replying(ok(b'{"error": {"message": "temperature is too hot"}}', status="400 No")))
    answer = post(pair, "pair")
    assert (answer.status, answer.error["message"]) == (400, "temperature is too hot")


def test_when_all_fail_the_error_is_the_last_one_s(pair: Service, upstreams: list[ChatUpstream]):
    for upstream in upstreams:
        upstream.play(BROKEN["fails"])
    answer = post(pair, "pair")
    assert answer.status == 502
    assert "out of memory" in answer.error["message"]


def test_what_has_begun_is_not_begun_again(pair: Service, upstreams: list[ChatUpstream]):
    for upstream in upstreams:
        upstream.play(streaming(event("half"), end=False))
    body = post(pair, "pair", stream=True).body
    half, error = sse(body)
    assert "half" in half
    assert "error" in json.loads(error)


def continuing(service: Service, upstreams: list[ChatUpstream], first: bytes, **more: object) -> Answer:
    """A stream whose first upstream sends `first` and breaks off; the second one would say the rest."""
    upstreams[0].play(streaming(first, end=False))
    upstreams[1].play(streaming(OPENING, event(" house"), usage_event(), DONE))
    for _ in range(2):  # in turns: one of two begins at the first
        answer = post(service, "continuing", stream=True, **more)
        if b'"The"' in answer.body:
            return answer
        upstreams[1].request()
    raise AssertionError("no stream began at the first upstream")


def test_plain_text_goes_on_where_messages_are_continued(pair: Service, upstreams: list[ChatUpstream]):
    first = event("The") + event(" light")
    answer = continuing(pair, upstreams, first, max_tokens=9, stream_options={"include_usage": True})
    *chunks, done = sse(answer.body)
    assert (text_of(answer.body), done) == ("The light house", "[DONE]")
    found = [json.loads(chunk) for chunk in chunks]
    assert {chunk["id"] for chunk in found} == {"x"}
    assert not any(choice["delta"].get("role") for chunk in found[2:] for choice in chunk["choices"])
    # The second one counted the two tokens of the first as prompt, and made 3.
    assert found[-1]["usage"] == {"prompt_tokens": 5, "completion_tokens": 5, "total_tokens": 10}
    sent = json.loads(upstreams[1].request().body)
    assert sent["messages"][-1] == {"role": "assistant", "content": "The light", "prefix": True}
    assert sent["messages"][0]["content"] == "Hello"
    assert sent["max_tokens"] == 7


def test_a_call_or_a_second_choice_does_not_go_on(pair: Service, upstreams: list[ChatUpstream]):
    call_part = b'data: {"choices":[{"index":0,"delta":{"tool_calls":[{"index":0}]}}]}\n\n'
    second = event("b").replace(b'"index": 0', b'"index": 1')
    for first in (event("The") + call_part, event("The") + second):
        body = continuing(pair, upstreams, first).body
        assert "error" in json.loads(sse(body)[-1])
        assert b"[DONE]" not in body


def test_one_that_breaks_off_again_and_again_is_left(pair: Service, upstreams: list[ChatUpstream]):
    upstreams[0].play(streaming(event("The"), end=False))
    upstreams[1].play(streaming(OPENING, end=False))
    for _ in range(2):
        body = post(pair, "continuing", stream=True).body
        assert "error" in json.loads(sse(body)[-1])


def test_another_model_answers_while_this_one_can_t(pair: Service, upstreams: list[ChatUpstream]):
    for upstream in upstreams:
        upstream.play(replying(ok(ANSWER)))
    assert json.loads(post(pair, "away").body) == json.loads(ANSWER)
    narrow = pair.new_key("narrow", "--models", "away")
    answer = call(pair.port, request("POST", PATH, chat("away"), narrow))
    assert answer.error["code"] == "engine_unavailable"


def test_one_that_keeps_failing_is_left_alone(pair: Service, upstreams: list[ChatUpstream]):
    upstreams[0].play(BROKEN["is away"])
    upstreams[1].play(replying(ok(ANSWER)))
    for _ in range(20):
        assert post(pair, "pair").status == 200
    asked = 0
    with suppress(queue.Empty):
        while upstreams[0].request(timeout=0.1):
            asked += 1
    assert 1 <= asked <= 8, "ten of twenty, were it not for the breaker"
