"""The engine is killed: nobody is told that all is well, and soon it is again."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator

import pytest

from fakes.configs import ENGINE, PATIENT, chat, counting
from fakes.json_validator import mismatches
from fakes.observe import alive, engine_busy, engine_pid, idle, log_of, metrics, ready, waiting
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request, sse, text_of

PATH = "/v1/chat/completions"
ENDLESS = {"logit_bias": {"2": -100}}  # token 2 would end the answer
TOKENS = 200


@pytest.fixture(scope="module")
def one_engine(start) -> Service:
    return start(PATIENT + ENGINE + "stall_timeout = 2.0\nread_timeout = 10.0\n", "--workers", "2")


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


def kill_engine(service: Service, number: signal.Signals = signal.SIGKILL) -> int:
    pid = engine_pid(service)
    assert pid is not None
    os.kill(pid, number)
    return pid


def successor(service: Service, killed: int) -> int | None:
    """The engine that is started in the place of the killed one."""
    pid = engine_pid(service)
    return None if pid == killed else pid


def test_it_is_restarted_and_readiness_tells_the_truth(engine: Service):
    killed = kill_engine(engine)
    started = eventually(lambda: successor(engine, killed), what="another engine")
    os.kill(started, signal.SIGSTOP)  # it takes as long to load as this test needs to look around
    refusal = eventually(lambda: not_ready(engine), what="/ready 503")
    assert refusal.error["code"] == "engine_unavailable"
    assert int(refusal.headers["retry-after"]) >= 1
    assert call(engine.port, request("GET", "/health")).status == 200
    assert metrics(engine)['deepseek_engine_up{kind="llamacpp",model="tiny",replica="0"}'] == 0

    # What comes meanwhile waits for the next one.
    early = [ask(engine, chat("tiny", stream=stream, max_tokens=2)) for stream in (True, False)]
    assert not_ready(engine)
    os.kill(started, signal.SIGCONT)
    assert text_of(early[0].answer().body)
    assert early[1].answer().json()["choices"]

    assert ready(engine) == 200
    assert not alive(killed)
    [state] = engine.engines()
    assert (state["state"], state["pid"]) == ("ready", started)


def not_ready(service: Service) -> Answer | None:
    answer = call(service.port, request("GET", "/ready"))
    return answer if answer.status == 503 else None


def test_answers_in_flight_go_on_and_the_queue_is_served(engine: Service):
    """One engine at temperature 0, killed twice: its clients read what they would have read anyway."""
    name = 'deepseek_tokens_total{kind="completion",model="tiny"}'
    question = counting("tiny", max_tokens=TOKENS)
    undisturbed = ask(engine, question).answer().json()
    eventually(lambda: idle(engine), what="the slot free")
    before = metrics(engine)[name]
    stream = ask(engine, {**question, "stream": True, "stream_options": {"include_usage": True}})
    stream.head()
    body = b"".join(stream.chunk() for _ in range(10))
    whole = ask(engine, question)
    eventually(lambda: engine_busy(engine) == 2, what="both slots at work")
    queued = [ask(engine, chat("tiny", stream=stream, max_tokens=2)) for stream in (True, False, True)]
    eventually(lambda: waiting(engine, "tiny") == 3, what="three in the queue")
    kill_engine(engine)
    body += b"".join(stream.chunk() for _ in range(20))
    kill_engine(engine)

    body += b"".join(iter(stream.chunk, b""))
    *chunks, done = sse(body)
    assert done == "[DONE]"
    assert all("error" not in json.loads(chunk) for chunk in chunks)
    usage = json.loads(chunks[-1])["usage"]
    answer = whole.answer().json()
    for counts in (usage, answer["usage"]):
        for kind in ("prompt_tokens", "completion_tokens"):
            assert counts[kind] == undisturbed["usage"][kind]
    text = undisturbed["choices"][0]["message"]["content"]
    assert text_of(body) == answer["choices"][0]["message"]["content"] == text
    assert [wire.answer().status for wire in queued] == [200] * 3
    made = usage["completion_tokens"] * 2 + 2 * 3
    eventually(lambda: metrics(engine)[name] - before >= made - 3, what="the tokens counted")
    assert metrics(engine)[name] - before <= made, "none is counted twice"


def test_choices_in_flight_and_an_engine_that_leaves_politely(engine: Service):
    """SIGTERM from somebody else is a death like any other; each choice goes on by itself."""
    wire = ask(engine, chat("tiny", "Count.", stream=True, n=4, max_tokens=120, **ENDLESS))
    wire.head()
    wire.chunk()
    kill_engine(engine, signal.SIGTERM)
    *chunks, done = sse(b"".join(iter(wire.chunk, b"")))
    assert done == "[DONE]"
    ends = [c for chunk in chunks for c in json.loads(chunk)["choices"] if c["finish_reason"]]
    assert sorted((end["index"], end["finish_reason"]) for end in ends) == [(i, "length") for i in range(4)]


LINE = {"type": "string", "minLength": 40, "maxLength": 60}
SCHEMA = {
    "type": "object",
    "properties": {"lines": {"type": "array", "items": LINE, "minItems": 3, "maxItems": 3}, "last": LINE},
    "required": ["lines", "last"],
    "additionalProperties": False,
}
FORM = {"response_format": {"type": "json_schema", "json_schema": {"name": "poem", "schema": SCHEMA}}}
POEM = {"type": "function", "function": {"name": "poem", "parameters": SCHEMA}}
FORCED = {"tools": [POEM], "tool_choice": "required"}


def test_answers_under_a_grammar_go_on_and_keep_to_it(engine: Service):
    """An engine that began the grammar anew would begin another object inside of the one that was begun."""
    wires = [
        ask(engine, chat("tiny", "A poem.", stream=True, max_tokens=1000, **it)) for it in (FORM, FORCED)
    ]
    begun = []
    for wire in wires:
        wire.head()
        begun.append(b"".join(wire.chunk() for _ in range(8)))
    kill_engine(engine)
    for wire, body, finish in zip(wires, begun, ("stop", "tool_calls"), strict=True):
        *events, done = sse(body + b"".join(iter(wire.chunk, b"")))
        assert done == "[DONE]"
        choices = [choice for event in events for choice in json.loads(event)["choices"]]
        assert choices[-1]["finish_reason"] == finish
        texts = [choice["delta"].get("content") or "" for choice in choices]
        calls = [call for choice in choices for call in choice["delta"].get("tool_calls", [])]
        texts += [call["function"].get("arguments", "") for call in calls]
        poem = json.loads("".join(texts))
        assert [*mismatches(poem, SCHEMA, SCHEMA)] == []


def test_an_engine_that_hangs_is_killed_and_its_answer_goes_on(engine: Service):
    stream = ask(engine, chat("tiny", "Count.", stream=True, max_tokens=100, **ENDLESS))
    stream.head()
    first = stream.chunk()
    stopped = kill_engine(engine, signal.SIGSTOP)
    *chunks, done = sse(first + b"".join(iter(stream.chunk, b"")))
    assert done == "[DONE]"
    assert json.loads(chunks[-1])["choices"][0]["finish_reason"] == "length"
    assert not alive(stopped)
