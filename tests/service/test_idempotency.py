"""A request that is sent again under its Idempotency-Key, to whichever worker."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from deepseek_api_compat import OpenAI
from fakes import ledger
from fakes.chat_upstream import ChatUpstream, answering_all, holding, replying
from fakes.configs import ENGINE, PATIENT, chat, upstream_model
from fakes.http_server import ok
from fakes.service import Service
from fakes.wire import Answer, Wire, call, request

PATH = "/v1/chat/completions"


@pytest.fixture(scope="module")
def shared(start: Callable[..., Service], chat_upstream: ChatUpstream) -> Service:
    return start(PATIENT + ENGINE + upstream_model("relay", chat_upstream), "--workers", "2")


@pytest.fixture
def service(shared: Service, upstream: ChatUpstream) -> Iterator[Service]:
    yield shared
    Wire.close_all()


def send(service: Service, body: object, name: str, key: str | None = None) -> Answer:
    return call(service.port, request("POST", PATH, body, key or service.key, f"Idempotency-Key: {name}"))


def test_it_is_answered_once(service: Service) -> None:
    """A connection of its own each time, so that both workers are asked; the ledger has one row."""
    body = chat("tiny", max_tokens=5)
    first = send(service, body, "once")
    assert first.status == 200
    assert "idempotent-replayed" not in first.headers
    for _ in range(8):
        again = send(service, body, "once")
        assert (again.status, again.json()) == (200, first.json())
        assert again.headers["idempotent-replayed"] == "true"
        assert again.headers["x-request-id"] != first.headers["x-request-id"]
    assert ledger.row(service, first.headers["x-request-id"])["completion_tokens"] == 5
    other = service.new_key("other")
    assert send(service, body, "once", other).json()["id"] != first.json()["id"]


def test_another_request_under_the_same_key(service: Service) -> None:
    assert send(service, chat("tiny", max_tokens=2), "reused").status == 200
    refused = send(service, chat("tiny", max_tokens=3), "reused")
    assert (refused.status, refused.error["code"]) == (400, "idempotency_key_reused")
    too_long = send(service, chat("tiny", max_tokens=3), "x" * 300)
    assert too_long.status == 400
    assert "Idempotency-Key" in too_long.error["message"]


def test_a_key_that_may_no_longer_use_the_model(service: Service) -> None:
    key, body = service.new_key("narrowed"), chat("tiny", max_tokens=2)
    assert send(service, body, "narrowed", key).status == 200
    service.command("keys", "update", "narrowed", "--models", "relay")
    assert send(service, body, "narrowed", key).status == 403


def test_while_it_is_being_answered(service: Service, upstream: ChatUpstream) -> None:
    released = asyncio.Event()
    upstream.play(holding(released))
    with ThreadPoolExecutor() as pool:
        first = pool.submit(send, service, chat("relay"), "busy")
        upstream.request()
        second = send(service, chat("relay"), "busy")
        assert (second.status, second.error["code"]) == (409, "idempotency_in_progress")
        assert second.headers["retry-after"] == "1"
        upstream.run(released.set)
        answer = first.result()
    assert answer.status == 200
    assert json.loads(send(service, chat("relay"), "busy").body) == json.loads(answer.body)


def test_what_failed_is_asked_again(service: Service, upstream: ChatUpstream) -> None:
    upstream.play(replying(ok(b'{"error": {"message": "no"}}', status="500 Error")))
    assert send(service, chat("relay"), "failed").status == 502
    upstream.play(answering_all)
    assert send(service, chat("relay"), "failed").status == 200


def test_a_stream_is_not_kept(service: Service) -> None:
    body = chat("tiny", max_tokens=3, stream=True)
    for _ in range(2):
        answer = send(service, body, "stream")
        assert answer.body.endswith(b"data: [DONE]\n\n")
        assert "idempotent-replayed" not in answer.headers


def test_our_client_s_retry_has_the_first_answer(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer is lost on its way: the client sees a broken connection after the service has sent it."""
    sent: list[Any] = []
    with OpenAI(api_key=service.key, base_url=f"{service.url}/v1", max_retries=1) as client:
        send_it = client._client.send
        library = sys.modules[send_it.__func__.__module__.partition(".")[0]]  # httpx, or its successor

        def lossy(*args: Any, **options: Any) -> Any:
            response = send_it(*args, **options)
            sent.append(response.json())
            if len(sent) == 1:
                raise library.ReadError("lost")
            return response

        monkeypatch.setattr(client._client, "send", lossy)
        answer = client.chat.completions.create(**chat("tiny", max_tokens=4))
    assert len(sent) == 2
    assert answer.id == sent[0]["id"] == sent[1]["id"]
