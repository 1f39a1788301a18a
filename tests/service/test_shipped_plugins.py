"""The plugins that ship, one behind the other, in a running service."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fakes.chat_upstream import DONE, STREAM_HEAD, ChatUpstream, event, frame, usage_event
from fakes.configs import ENGINE, PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.observe import metrics, watched
from fakes.service import Service, eventually
from fakes.wire import Answer, call, request, sse

PLUGINS = """
[[plugins]]
use = "prompt-templates"
[plugins.options.templates.letter]
system = "You write to {{ name }}."
user = "Repeat: {{ message }}"

[[plugins]]
use = "pii"
options = { kinds = ["email", "phone"], patterns = { staff = "STAFF-[0-9]{4}" } }

[[plugins]]
use = "answer-cache"
options = { ttl = 600 }
"""
MAIL, PHONE = "li.si@example.com", "13812345678"
LETTER: dict[str, Any] = {"template": "letter", "variables": {"name": MAIL}, "temperature": 0}


def finish_event() -> bytes:
    choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
    return b"data: " + json.dumps({"id": "x", "choices": [choice]}).encode() + b"\n\n"


async def echoing(peer: Peer, request: Request) -> None:
    """Says what the last message says; in a stream one character at a time."""
    body = json.loads(request.body)
    said = body["messages"][-1]["content"]
    if body.get("stream"):
        await peer.send(STREAM_HEAD)
        for part in (*map(event, said), finish_event(), usage_event(), DONE):
            await peer.send(frame(part))
        await peer.send(b"0\r\n\r\n")
        return
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": said},
        "finish_reason": "stop",
    }
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    await peer.send(ok(json.dumps({"id": "x", "choices": [choice], "usage": usage}).encode()))


@pytest.fixture(scope="module")
def shipped_service(start: Any, chat_upstream: ChatUpstream) -> Service:
    return start(PATIENT + ENGINE + upstream_model("relay", chat_upstream) + PLUGINS)


@pytest.fixture
def shipped(shipped_service: Service, upstream: ChatUpstream) -> Iterator[Service]:
    upstream.play(echoing)
    yield from watched(shipped_service)


def ask(service: Service, said: str, model: str = "relay", key: str | None = None, **more: Any) -> Answer:
    body = chat(model, said, **more)
    return call(service.port, request("POST", "/v1/chat/completions", body, key or service.key))


def said(answer: Answer) -> str:
    assert answer.status == 200, answer.body
    if not answer.body.startswith(b"data:"):
        return str(answer.json()["choices"][0]["message"]["content"])
    *events, end = sse(answer.body)
    assert end == "[DONE]"
    choices = [choice for data in events for choice in json.loads(data)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def hits(service: Service) -> float:
    return metrics(service).get('deepseek_plugin_replies_total{plugin="answer-cache"}', 0)


@pytest.mark.parametrize("stream", [True, False])
def test_the_upstream_sees_no_personal_data_and_the_client_does(
    shipped: Service, upstream: ChatUpstream, stream: bool
):
    text = f"{MAIL}, {PHONE}, STAFF-1234, <EMAIL>"
    assert said(ask(shipped, text, stream=stream, **{**LETTER, "temperature": 1})) == f"Repeat: {text}"
    sent = json.loads(upstream.request().body)
    assert sent["messages"] == [
        {"role": "system", "content": "You write to <EMAIL_1>."},
        {"role": "user", "content": "Repeat: <EMAIL_1>, <PHONE_1>, <STAFF_1>, <EMAIL>"},
    ]
    assert not sent.keys() & {"template", "variables", "cache"}
    written = b"".join(file.read_bytes() for file in shipped.data_dir.rglob("*") if file.is_file())
    assert MAIL.encode() not in written
    assert PHONE.encode() not in written


def test_a_variable_that_is_missing(shipped: Service):
    answer = ask(shipped, "Hello", template="letter")
    assert (answer.status, answer.error["param"]) == (400, "variables")
    assert "'name' is undefined" in answer.error["message"]


@pytest.mark.parametrize("streams", [(True, False), (False, True)])
def test_the_same_request_is_not_asked_again(
    shipped: Service, upstream: ChatUpstream, streams: tuple[bool, bool]
):
    text = f"{PHONE} {streams}"
    options = {"stream_options": {"include_usage": True}}
    first = ask(shipped, text, stream=streams[0], **(options if streams[0] else {}), **LETTER)
    assert said(first) == f"Repeat: {text}"
    upstream.request()
    before = hits(shipped)

    def again() -> Answer | None:
        answer = ask(shipped, text, stream=streams[1], **(options if streams[1] else {}), **LETTER)
        return answer if hits(shipped) > before else None

    # An answer is kept beside what comes next, so it may take a moment.
    second = eventually(again, what="an answer from the cache")
    assert said(second) == said(first)
    for answer in (first, second):
        last = sse(answer.body)[-2] if answer.body.startswith(b"data:") else answer.body
        assert json.loads(last)["usage"]["prompt_tokens"] == 7
        assert json.loads(last)["usage"]["completion_tokens"] == 3
    upstream.play(echoing)
    assert said(ask(shipped, text, key=shipped.new_key(str(streams)), **LETTER)) == f"Repeat: {text}"
    assert json.loads(upstream.request().body)["messages"]  # another key's request
    kept = b"".join(file.read_bytes() for file in (shipped.data_dir / "plugins/answer-cache").iterdir())
    assert b"Repeat: <PHONE_1>" in kept
    assert PHONE.encode() not in kept


def test_an_engines_answer_is_kept_too(shipped: Service):
    more: dict[str, Any] = {"model": "tiny", "temperature": 0, "stop": [" "], "max_tokens": 50}
    first = ask(shipped, "Say a few words.", **more)
    assert first.json()["choices"][0]["finish_reason"] == "stop"
    before = hits(shipped)

    def again() -> Answer | None:
        answer = ask(shipped, "Say a few words.", **more)
        return answer if hits(shipped) > before else None

    second = eventually(again, what="an answer from the cache").json()
    assert second["choices"] == first.json()["choices"]
    assert second["usage"] == first.json()["usage"]
