"""Plugins in a running service: in front of a token engine and of a chat upstream, streamed and whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.chat_upstream import DONE, ChatUpstream, event, one_by_one, usage_event
from fakes.configs import ENGINE, PATIENT, chat, upstream_model
from fakes.observe import metrics, watched
from fakes.service import Service, eventually
from fakes.wire import Answer, call, request, sse

PLUGINS = '''
from deepseek_api_compat.plugins import Finish, Refuse, Reply, Text, Usage


class Shout:
    """Knows its commands; makes all text upper case and counts it at the end."""

    quick = True

    def pre_process(self, request, context):
        said = request["messages"][-1]["content"]
        if said == "refuse":
            raise Refuse("Not this.", code="not_this", status=403)
        if said == "fail":
            raise LookupError("a secret of the plugin")
        if said == "reply":
            return Reply([Text(0, "at once"), Finish(0, "stop"), Usage(1, 0, 2)])
        request.pop("command", None)
        request["messages"].insert(0, {"role": "system", "content": "Speak."})

    def on_event(self, event, context):
        if isinstance(event, Text):
            if "fail" in context.state:
                raise LookupError
            return Text(event.index, event.text.upper(), event.logprobs)

    async def post_process(self, outcome, context):
        with open(f"{context.data_dir.parent.parent}/outcomes.txt", "a") as file:
            print(outcome.status, outcome.finish, outcome.completion_tokens, outcome.error_code, file=file)


class Breaks:
    """Fails in the middle of an answer."""

    def on_event(self, event, context):
        context.state["seen"] = context.state.get("seen", 0) + 1
        if context.state["seen"] == 2:
            raise LookupError("a secret of the plugin")
'''


@pytest.fixture(scope="module")
def plugged_service(
    start: Any, chat_upstream: ChatUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Service:
    folder = tmp_path_factory.mktemp("plugins")
    (folder / "loud_plugins.py").write_text(PLUGINS)
    tables = f"""
[[plugins]]
use = "loud_plugins:Shout"
path = "{folder}"
models = ["tiny", "relay"]
[[plugins]]
use = "loud_plugins:Breaks"
path = "{folder}"
models = ["broken"]
"""
    models = "".join(upstream_model(name, chat_upstream) for name in ("relay", "broken", "plain"))
    return start(PATIENT + ENGINE + models + tables)


@pytest.fixture
def plugged(plugged_service: Service, upstream: ChatUpstream) -> Iterator[Service]:
    yield from watched(plugged_service)


def ask(service: Service, model: str, said: str = "Hello", **more: Any) -> Answer:
    return call(service.port, request("POST", "/v1/chat/completions", chat(model, said, **more), service.key))


def chunks(answer: Answer) -> list[Any]:
    assert sse(answer.body)[-1] == "[DONE]"
    return [json.loads(data) for data in sse(answer.body)[:-1]]


def said(answer: Answer) -> str:
    if not answer.body.startswith(b"data:"):
        return str(answer.json()["choices"][0]["message"]["content"])
    return "".join(
        choice["delta"].get("content") or "" for one in chunks(answer) for choice in one["choices"]
    )


def outcomes(service: Service) -> list[str]:
    file = Path(service.data_dir) / "outcomes.txt"
    return file.read_text().splitlines() if file.exists() else []


@pytest.mark.parametrize("stream", [True, False])
def test_a_token_engines_answer(plugged: Service, stream: bool):
    answer = said(ask(plugged, "tiny", max_tokens=8, stream=stream))
    assert answer
    assert answer == answer.upper()
    assert answer != answer.lower()


@pytest.mark.parametrize("stream", [True, False])
def test_a_chat_upstreams_answer(plugged: Service, upstream: ChatUpstream, stream: bool):
    if stream:
        upstream.play(one_by_one(event("hello "), event("you"), usage_event(), DONE))
    answer = ask(plugged, "relay", stream=stream, command="x")
    assert said(answer) == ("HELLO YOU" if stream else "")
    assert "".join(upstream.request().body.decode().split()).count('"command"') == 0
    if stream:
        assert all(one["model"] == "relay" for one in chunks(answer))


def test_what_goes_up_is_what_the_plugin_made(plugged: Service, upstream: ChatUpstream):
    assert ask(plugged, "relay").status == 200
    sent = json.loads(upstream.request().body)
    assert [message["role"] for message in sent["messages"]] == ["system", "user"]


@pytest.mark.parametrize("model", ["tiny", "relay"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_without_an_engine(plugged: Service, model: str, stream: bool):
    answer = ask(plugged, model, "reply", stream=stream)
    assert answer.status == 200
    assert said(answer) == "at once"


def test_refused_by_a_plugin(plugged: Service):
    answer = ask(plugged, "tiny", "refuse")
    assert (answer.status, answer.error["code"], answer.error["message"]) == (403, "not_this", "Not this.")


def test_the_end_is_told(plugged: Service):
    before = len(outcomes(plugged))
    assert ask(plugged, "tiny", max_tokens=4, logit_bias={"2": -100, "0": -100}).status == 200
    assert ask(plugged, "tiny", "refuse").status == 403
    told = eventually(lambda: (new := outcomes(plugged)[before:])[1:] and new, what="two outcomes")
    assert sorted(told) == ["200 length 4 None", "403 None 0 not_this"]


def test_a_model_without_plugins_is_relayed_as_it_comes(plugged: Service, upstream: ChatUpstream):
    assert ask(plugged, "plain", stream=True).body.startswith(event("hello"))


# These leave tracebacks in the log, where no other test may find one: they come last.


def test_a_failed_plugin_ends_the_request_and_tells_no_secret(plugged_service: Service):
    answer = ask(plugged_service, "tiny", "fail", stream=True)
    assert (answer.status, answer.error["code"]) == (500, "plugin_failed")
    assert b"secret" not in answer.body
    assert 'deepseek_plugin_failures_total{hook="pre_process",plugin="Shout"}' in metrics(plugged_service)


def test_a_plugin_that_fails_in_the_middle_ends_the_stream_without_done(
    plugged_service: Service, upstream: ChatUpstream
):
    upstream.play(one_by_one(event("one"), event("two"), event("three"), usage_event(), DONE))
    answer = ask(plugged_service, "broken", stream=True)
    assert answer.status == 200
    events = sse(answer.body)
    assert json.loads(events[-1])["error"]["code"] == "plugin_failed"
    assert b"two" not in answer.body
