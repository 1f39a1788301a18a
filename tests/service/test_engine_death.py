"""The engine is killed: nobody is told that all is well, and soon it is again."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from fakes.configs import ENGINE, IMPATIENT, chat
from fakes.observe import alive, engine_busy, idle, log_of, metrics, ready, waiting
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request, sse, text_of

PATH = "/v1/chat/completions"
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}}  # token 2 would end the answer


@pytest.fixture(scope="module")
def one_engine(start) -> Service:
    """An impatient service would hide what is waited for: this one sends no early keep-alives."""
    patient = IMPATIENT.replace("first_event_timeout = 0.4", "first_event_timeout = 60")
    return start(patient + ENGINE, "--workers", "2")


@pytest.fixture
def engine(one_engine: Service) -> Iterator[Service]:
    workers = one_engine.workers()
    yield one_engine
    Wire.close_all()
    eventually(lambda: ready(one_engine) == 200, what="ready again")
    eventually(lambda: idle(one_engine), what="all slots free")
    assert one_engine.workers() == workers, "the gateway does not die with its engine"
    assert "Traceback" not in log_of(one_engine)


def ask(service: Service, body: object) -> Wire:
    return Wire(service.port).send(request("POST", PATH, body, service.key))


def post(service: Service, body: object) -> Answer:
    return call(service.port, request("POST", PATH, body, service.key))


def kill_engine(service: Service, number: signal.Signals = signal.SIGKILL) -> int:
    [state] = service.engines()
    os.kill(state["pid"], number)
    return int(state["pid"])


def test_it_is_restarted_and_readiness_tells_the_truth(engine: Service):
    killed = kill_engine(engine)
    began = time.monotonic()
    seen = {200}
    while time.monotonic() - began < 10 and not (503 in seen and ready(engine) == 200):
        answer = httpx.get(engine.url + "/ready")
        seen.add(answer.status_code)
        if answer.status_code == 503:
            assert answer.json()["error"]["type"] == "server_error"
            assert int(answer.headers["retry-after"]) >= 1
            assert httpx.get(engine.url + "/health").status_code == 200
    assert seen == {200, 503}
    assert not alive(killed)
    [state] = engine.engines()
    assert (state["state"], state["pid"] != killed) == ("ready", True)
    assert post(engine, chat("tiny", max_tokens=2)).status == 200


def test_a_stream_in_flight_ends_with_an_error_event(engine: Service):
    wire = ask(engine, chat("tiny", "Count.", stream=True, **LONG))
    wire.head()
    first = wire.chunk()
    kill_engine(engine)
    *chunks, last = sse(first + b"".join(iter(wire.chunk, b"")))
    assert all("error" not in json.loads(chunk) for chunk in chunks)
    assert json.loads(last)["error"]["type"] == "server_error"


def test_an_answer_in_flight_is_a_502(engine: Service):
    wire = ask(engine, chat("tiny", "Count.", **LONG))
    eventually(lambda: engine_busy(engine) == 1, what="the engine at work")
    time.sleep(0.3)  # so that some of the answer is there
    kill_engine(engine)
    answer = wire.answer()
    assert (answer.status, answer.error["type"]) == (502, "server_error")


def test_several_choices_in_flight(engine: Service):
    wire = ask(engine, chat("tiny", "Count.", stream=True, n=4, **LONG))
    wire.head()
    wire.chunk()
    kill_engine(engine)
    body = b"".join(iter(wire.chunk, b""))
    assert "error" in json.loads(sse(body)[-1])
    assert b"[DONE]" not in body


def test_what_has_not_begun_waits(engine: Service):
    kill_engine(engine)
    answers = [ask(engine, chat("tiny", stream=stream, max_tokens=2)) for stream in (True, False)]
    assert text_of(answers[0].answer().body) is not None
    assert answers[1].answer().json()["choices"]


def test_the_queue_outlives_the_engine(engine: Service):
    """Two in flight are lost; those in the queue behind them are served by the next engine."""
    busy = [ask(engine, chat("tiny", "Count.", stream=True, **LONG)) for _ in range(2)]
    for wire in busy:
        wire.head()
        wire.chunk()
    queued = [ask(engine, chat("tiny", stream=stream, max_tokens=2)) for stream in (True, False, True)]
    eventually(lambda: waiting(engine, "tiny") == 3, what="three in the queue")
    kill_engine(engine)
    for wire in busy:
        assert "error" in json.loads(sse(b"".join(iter(wire.chunk, b"")))[-1])
    assert [wire.answer().status for wire in queued] == [200] * 3


def test_an_engine_that_hangs_up_politely(engine: Service):
    """SIGTERM from somebody else is a death like any other."""
    wire = ask(engine, chat("tiny", "Count.", stream=True, **LONG))
    wire.head()
    wire.chunk()
    kill_engine(engine, signal.SIGTERM)
    assert "error" in json.loads(sse(b"".join(iter(wire.chunk, b"")))[-1])


def test_usage_of_the_lost_is_counted(engine: Service):
    name = 'deepseek_tokens_total{kind="completion",model="tiny"}'
    before = metrics(engine)[name]
    wire = ask(engine, chat("tiny", "Count.", stream=True, **LONG))
    wire.head()
    received = sum(len(sse(wire.chunk())) for _ in range(10))
    kill_engine(engine)
    assert b"error" in b"".join(iter(wire.chunk, b""))
    eventually(lambda: metrics(engine)[name] - before >= received - 1, what="the tokens counted")


def test_restarts_are_spaced_out(engine: Service):
    """Killed again as soon as it is up, it comes back after longer and longer pauses."""
    gaps = []
    for _ in range(3):
        kill_engine(engine)
        died = time.monotonic()
        eventually(lambda: ready(engine) == 503, timeout=5, what="not ready")
        eventually(lambda: ready(engine) == 200, timeout=20, what="ready again")
        gaps.append(time.monotonic() - died)
    assert gaps[-1] > gaps[0]
