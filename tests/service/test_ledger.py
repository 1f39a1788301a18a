"""Each request that is admitted is in the ledger once, with what it used, however it ended."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import pytest

from fakes import ledger
from fakes.chat_upstream import (
    DONE,
    STREAM_HEAD,
    USAGE,
    ChatUpstream,
    event,
    frame,
    holding,
    replying,
    streaming,
)
from fakes.configs import ENGINE, IMPATIENT, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.ledger import Row
from fakes.observe import metrics, ready, waiting
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request, sse

PATH = "/v1/chat/completions"
LONG = {"max_tokens": 1500, "logit_bias": {"2": -100}}  # token 2 would end the answer
# Micro-units a token, so that prices are easy to see.
PRICES = "".join(
    f'[[prices]]\nmodel = "{model}"\nprompt = 1\ncached = 1\ncompletion = 2\n'
    for model in ("tiny", "relay", "capped")
)
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"unit": {"type": "string", "enum": ["celsius", "fahrenheit"]}},
            "required": ["unit"],
            "additionalProperties": False,
        },
    },
}


def everything(upstream: ChatUpstream, more: str = "") -> str:
    """A token engine with two slots, and relays without and with a cap."""
    relays = upstream_model("relay", upstream) + upstream_model("capped", upstream, concurrency=1)
    return IMPATIENT + more + PRICES + ENGINE + relays


def ask(service: Service, body: object, key: str | None = None, path: str = PATH) -> Wire:
    return Wire(service.port).send(request("POST", path, body, key or service.key))


def post(service: Service, body: object, key: str | None = None, path: str = PATH) -> Answer:
    return call(service.port, request("POST", path, body, key or service.key))


def row_of(service: Service, answer: Answer) -> Row:
    return ledger.row(service, answer.headers["x-request-id"])


def used(row: Row) -> tuple[int, int]:
    return row["prompt_tokens"], row["completion_tokens"]


def told(usage: dict[str, Any]) -> tuple[int, int]:
    return usage["prompt_tokens"], usage["completion_tokens"]


def forever(upstream: ChatUpstream, *first: bytes) -> Callable[[Peer, Request], Any]:
    """A stream of these parts that goes on in silence until its client has left."""

    async def play(peer: Peer, _: Request) -> None:
        await peer.send(STREAM_HEAD + b"".join(map(frame, first)))
        await upstream.leave(peer)

    return play


@pytest.fixture(scope="module")
def both(start, chat_upstream: ChatUpstream) -> Service:
    return start(everything(chat_upstream), "--workers", "2")


@pytest.fixture
def service(both: Service, upstream: ChatUpstream) -> Iterator[Service]:
    yield both
    Wire.close_all()
    eventually(lambda: ready(both) == 200, what="ready again")


# Answers


ANSWERS = {
    "whole": (PATH, chat("tiny", max_tokens=5)),
    "stream": (PATH, chat("tiny", max_tokens=5, stream=True, stream_options={"include_usage": True})),
    "choices": (PATH, chat("tiny", max_tokens=5, n=3, temperature=1)),
    "tools": (PATH, chat("tiny", max_tokens=90, tools=[TOOL], tool_choice="required")),
    "completion": ("/v1/completions", {"model": "tiny", "prompt": ["Once", "Twice"], "max_tokens": 4}),
    "relay": (PATH, chat("relay")),
    "relayed completion": ("/v1/completions", {"model": "relay", "prompt": "Once"}),
    "relayed stream": (PATH, chat("relay", stream=True, stream_options={"include_usage": True})),
}


@pytest.mark.parametrize("name", list(ANSWERS))
def test_an_answer_is_written_down_as_its_client_was_told(service: Service, name: str):
    path, body = ANSWERS[name]
    answer = post(service, body, path=path)
    assert answer.status == 200, answer
    row = row_of(service, answer)
    document = json.loads(sse(answer.body)[-2]) if body.get("stream") else answer.json()
    prompt, completion = told(document["usage"])
    assert used(row) == (prompt, completion)
    assert row["sent_tokens"] == completion
    assert row["price"] == prompt + 2 * completion
    assert (row["outcome"], row["status"], row["error_code"]) == ("ok", 200, None)
    assert (row["model"], row["endpoint"]) == (body["model"], path.removeprefix("/v1"))
    assert row["total_ms"] >= row["queue_ms"] >= 0
    if body["model"] == "tiny":
        first = document["choices"][0] if not body.get("stream") else final_choice(answer)
        assert row["finish"] == first["finish_reason"]
        assert row["total_ms"] >= row["ttft_ms"] > 0


def final_choice(answer: Answer) -> dict[str, Any]:
    *_, last, _usage, _done = sse(answer.body)
    return dict(json.loads(last)["choices"][0])


def test_a_relayed_stream_is_counted_by_usage_that_its_client_did_not_ask_for(service: Service):
    answer = post(service, chat("relay", stream=True))
    assert b"usage" not in answer.body
    row = row_of(service, answer)
    assert used(row) == told(USAGE)
    assert (row["outcome"], row["sent_tokens"]) == ("ok", USAGE["completion_tokens"])


def test_a_relayed_stream_without_usage_is_counted_by_its_events(service: Service, upstream: ChatUpstream):
    upstream.play(streaming(event("a"), event("data: data: data:") + event("b"), DONE))
    row = row_of(service, post(service, chat("relay", stream=True)))
    assert (row["completion_tokens"], row["sent_tokens"]) == (3, 3)
    assert row["prompt_tokens"] > 0


def test_embeddings_have_a_prompt_only(service: Service, upstream: ChatUpstream):
    vectors = b'{"object":"list","data":[{"embedding":[1,2]}],"usage":{"prompt_tokens":4,"total_tokens":4}}'
    upstream.play(replying(ok(vectors)))
    answer = post(service, {"model": "relay", "input": "x"}, path="/v1/embeddings")
    row = row_of(service, answer)
    assert (used(row), row["price"], row["endpoint"]) == ((4, 0), 4, "/embeddings")


# Clients that leave


@pytest.mark.parametrize("model", ["tiny", "relay"])
def test_a_client_that_leaves_a_stream_pays_for_what_was_made(
    service: Service, upstream: ChatUpstream, model: str
):
    upstream.play(forever(upstream, event("a") + event("b"), event("c")))
    more = LONG if model == "tiny" else {}
    wire = ask(service, chat(model, "Count.", stream=True, **more))
    _, headers = wire.head()
    received = b"".join(wire.chunk() for _ in range(2))
    wire.reset()
    row = ledger.row(service, headers["x-request-id"])
    assert (row["outcome"], row["status"]) == ("cancelled_by_client", 499)
    assert row["completion_tokens"] >= row["sent_tokens"] >= 1
    assert row["prompt_tokens"] > 0
    assert row["price"] == row["prompt_tokens"] + 2 * row["completion_tokens"]
    if model == "relay":
        assert row["completion_tokens"] == row["sent_tokens"] == received.count(b"data:") == 3


@pytest.mark.parametrize("model", ["tiny", "relay"])
def test_a_client_that_leaves_before_a_whole_answer_pays_too(
    service: Service, upstream: ChatUpstream, model: str
):
    upstream.play(holding(asyncio.Event()))
    key = service.new_key(f"whole-{model}")
    more = LONG if model == "tiny" else {}
    wire = ask(service, chat(model, "Count.", **more), key)
    wire.head()  # with a first keep-alive: by now it is dispatched
    wire.close()
    [row] = ledger.rows_of_key(service, f"whole-{model}", 1)
    assert (row["outcome"], row["status"], row["sent_tokens"]) == ("cancelled_by_client", 499, 0)
    assert row["prompt_tokens"] > 0
    assert (row["completion_tokens"] > 0) == (model == "tiny")


def test_a_client_that_leaves_the_queue_is_written_down_and_pays_nothing(
    service: Service, upstream: ChatUpstream
):
    upstream.play(forever(upstream, event("a")))
    busy = ask(service, chat("capped", stream=True))
    busy.head()
    key = service.new_key("queued")
    wire = ask(service, chat("capped"), key)
    eventually(lambda: waiting(service, "capped") == 1, what="one in the queue")
    wire.close()
    [row] = ledger.rows_of_key(service, "queued", 1)
    assert row["outcome"] == "cancelled_by_client"
    assert (used(row), row["price"], row["replica"], row["queue_ms"]) == ((0, 0), 0, None, None)


# Engines that fail


def engine_killed_under(service: Service, **more: Any) -> tuple[Wire, str]:
    """A stream that was begun by an engine that is dead, and its request id."""
    wire = ask(service, chat("tiny", "Count in JSON.", stream=True, **more))
    _, headers = wire.head()
    seen = b""
    while seen.count(b'"content":"') < 12:  # keep-alives don't count
        seen += wire.chunk()
    [pid] = [state["pid"] for state in service.engines() if state["kind"] == "llamacpp"]
    os.kill(pid, signal.SIGKILL)
    return wire, headers["x-request-id"]


def test_a_stream_that_two_engines_made_is_one_row(service: Service):
    wire, id = engine_killed_under(service, max_tokens=100, logit_bias={"2": -100})
    assert sse(b"".join(iter(wire.chunk, b"")))[-1] == "[DONE]"
    row = ledger.row(service, id)
    assert (row["outcome"], row["status"], row["finish"]) == ("ok", 200, "length")
    assert row["completion_tokens"] == row["sent_tokens"] == 100


def test_a_stream_that_no_other_engine_can_go_on_with_is_lost(service: Service):
    """Engines know what a letter is in any language, and what remains of such a pattern they alone know."""
    text = {"type": "string", "pattern": r"^(\p{L}| ){3000}$"}
    schema = {"type": "object", "properties": {"x": text}, "required": ["x"]}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    wire, id = engine_killed_under(service, response_format=form)
    assert "error" in json.loads(sse(b"".join(iter(wire.chunk, b"")))[-1])
    row = ledger.row(service, id)
    assert (row["outcome"], row["status"]) == ("engine_lost", 502)
    assert row["error_code"]
    assert row["completion_tokens"] == row["sent_tokens"] >= 4


@pytest.mark.parametrize(
    ("play", "outcome", "status", "counts"),
    [
        (streaming(event("a"), event("b"), end=False), "engine_lost", 502, 2),
        (replying(ok(b'{"error": {"message": "no"}}', status="500 Error")), "engine_lost", 502, 0),
        (replying(ok(b'{"error": {"message": "no"}}', status="400 Bad")), "error", 400, 0),
        (streaming(event("a"), b'data: {"error": {"message": "no"}}\n\n'), "engine_lost", 502, 2),
    ],
    ids=["dies", "fails", "refuses", "reports"],
)
def test_an_upstream_that_fails(
    service: Service, upstream: ChatUpstream, play: Any, outcome: str, status: int, counts: int
):
    upstream.play(play)
    row = row_of(service, post(service, chat("relay", stream=True)))
    assert (row["outcome"], row["status"]) == (outcome, status)
    assert abs(row["completion_tokens"] - counts) <= 1
    assert (row["prompt_tokens"] > 0) == (counts > 0)
    assert row["sent_tokens"] <= counts


# Refusals, sums and the end


def test_refusals_sums_and_a_drain(start, upstream: ChatUpstream):
    config = everything(upstream).replace("[limits]", "drain_timeout = 1\n[limits]")
    service = start(config, "--workers", "2")
    keys = {name: service.new_key(name) for name in ("good", "wrong")}
    narrow = service.new_key("narrow", "--models", "relay")
    often = service.new_key("often", "--rpm", "1")
    poor = service.new_key("penniless", "--budget", "0.000001")
    usages = [post(service, body, keys["good"], path).json()["usage"] for path, body in wholes()]
    refused = [
        post(service, chat("no-such-model"), keys["wrong"]),
        post(service, b"{", keys["wrong"]),
        post(service, b"{", keys["wrong"]),
        post(service, chat("tiny"), narrow),
        post(service, chat("relay"), often),
        post(service, chat("relay"), often),
        post(service, chat("relay"), poor),
        post(service, chat("relay"), "DSK-" + "x" * 40),
    ]
    assert [answer.status for answer in refused] == [404, 400, 400, 403, 200, 429, 402, 401]
    sums = {name: value for name, value in metrics(service).items() if "_tokens_total" in name}

    upstream.play(forever(upstream, event("a")))
    wire = ask(service, chat("relay", stream=True), keys["good"])
    _, headers = wire.head()
    wire.chunk()
    assert service.stop(signal.SIGTERM) == 0

    rows = ledger.rows(service)
    assert len(rows) == len(usages) + 2, "the answers, the first of `often`, and the stream"
    last = rows.pop(headers["x-request-id"])
    assert (last["outcome"], last["status"]) == ("cancelled_by_shutdown", 503)
    assert last["completion_tokens"] == last["sent_tokens"] == 1
    good = [row for row in rows.values() if row["key_id"] == ledger.key_id(service, "good")]
    assert sorted(map(used, good)) == sorted(map(told, usages))
    for model in ("tiny", "relay"):
        of_model = [row for row in rows.values() if row["model"] == model]
        for kind in ("prompt", "completion"):
            name = f'deepseek_tokens_total{{kind="{kind}",model="{model}"}}'
            assert sum(row[f"{kind}_tokens"] for row in of_model) == sums[name]

    names = {ledger.key_id(service, name): name for name in ("wrong", "narrow", "often", "penniless")}
    with ledger.database(service.data_dir) as found:
        sql = "SELECT key_id, code, SUM(count) AS count FROM refusals GROUP BY key_id, code"
        counted = {(names[one["key_id"]], one["code"]): one["count"] for one in found.execute(sql)}
    assert counted == {
        ("wrong", "model_not_found"): 1,
        ("wrong", "invalid_request_error"): 2,
        ("narrow", "model_not_allowed"): 1,
        ("often", "requests_per_minute_exceeded"): 1,
        ("penniless", "insufficient_quota"): 1,
    }
    service.command("ledger", "verify")  # fails if rows and sums differ


def wholes() -> list[tuple[str, dict[str, Any]]]:
    return [(path, body) for path, body in ANSWERS.values() if not body.get("stream")]


# Limits. An answer of the upstream uses 10 tokens, for 13 micro-units; SHORT reserves some 27, for 32.

SHORT = chat("relay", max_tokens=5)


@pytest.fixture(scope="module")
def priced(chat_upstream: ChatUpstream) -> str:
    """A relay that costs, in a service that ends at once when it is told to."""
    prices = '[[prices]]\nmodel = "relay"\nprompt = 1\ncached = 1\ncompletion = 2\n'
    return IMPATIENT + prices + upstream_model("relay", chat_upstream)


@pytest.fixture(scope="module")
def two_workers(start, priced: str) -> Service:
    return start(priced, "--workers", "2")


@pytest.fixture
def limited(two_workers: Service, upstream: ChatUpstream) -> Service:
    return two_workers


def series(service: Service, key: str, count: int) -> list[Answer]:
    """Answers to SHORT on one connection: each request is settled before the next one is read."""
    with Wire(service.port) as wire:
        return [wire.send(request("POST", PATH, SHORT, key)).answer() for _ in range(count)]


def codes(answers: list[Answer]) -> list[str | None]:
    return [answer.json().get("error", {}).get("code") for answer in answers]


def test_tokens_of_a_day_are_those_used_and_refusals_cost_nothing(limited: Service):
    key = limited.new_key("daily", "--tpd", "100", "--rpm", "12")
    answers = series(limited, key, 20)
    assert codes(answers) == [None] * 8 + ["tokens_per_day_exceeded"] * 12
    # Requests of the minute: 8, and 4 are left.
    key_id = ledger.key_id(limited, "daily")
    limited.command("keys", "update", key_id, "--tpd", "0")
    answers = series(limited, key, 6)
    assert codes(answers)[:4] == [None] * 4
    assert codes(answers)[5] == "requests_per_minute_exceeded"
    rows = ledger.rows_of_key(limited, "daily", 12)
    assert sum(sum(used(row)) for row in rows) == 10 * len(rows)


def test_tokens_of_a_minute_are_told(limited: Service):
    key = limited.new_key("minutely", "--tpm", "60")
    answers = series(limited, key, 6)
    assert codes(answers) == [None] * 4 + ["tokens_per_minute_exceeded"] * 2
    assert {answer.headers["x-ratelimit-limit-tokens"] for answer in answers} == {"60"}
    left = [int(answer.headers["x-ratelimit-remaining-tokens"]) for answer in answers]
    assert left[4] <= left[5] <= left[4] + 2, "the refused one took nothing; some come back each second"


def test_a_client_that_left_has_spent_what_it_used(limited: Service, upstream: ChatUpstream):
    key = limited.new_key("leaver", "--tpd", "120", "--concurrency", "1")
    upstream.play(forever(upstream, event("a") * 80))
    with ask(limited, chat("relay", stream=True, max_tokens=5), key) as wire:
        wire.head()
        wire.chunk()
        assert codes([post(limited, SHORT, key)]) == ["concurrency_exceeded"]
    ledger.rows_of_key(limited, "leaver", 1)
    assert codes([post(limited, SHORT, key)]) == ["tokens_per_day_exceeded"]


def test_a_killed_worker_s_reservations_come_back(limited: Service, upstream: ChatUpstream):
    key = limited.new_key("unlucky", "--budget", "0.002", "--concurrency", "2")
    upstream.play(forever(upstream, event("a")))
    wire = ask(limited, chat("relay", stream=True, max_tokens=900), key)
    wire.head()
    assert post(limited, chat("relay", max_tokens=900), key).status == 402, "all is reserved"
    for pid in limited.workers():
        os.kill(pid, signal.SIGKILL)
    upstream.play(holding(asyncio.Event()))
    # The same again fits again: what was used is a few micro-units.
    again = Wire(limited.port).send(request("POST", PATH, chat("relay", stream=True, max_tokens=900), key))
    assert again.head()[0] == 200
    again.close()
    lost, _ = ledger.rows_of_key(limited, "unlucky", 2)
    assert (lost["outcome"], lost["status"], lost["sent_tokens"]) == ("gateway_lost", None, 1)
    assert lost["price"] == lost["prompt_tokens"] + 2


def test_budgets_survive_a_kill(start, priced: str, upstream: ChatUpstream):
    first = start(priced)
    key = first.new_key("poor", "--budget", "0.00006")
    answers = series(first, key, 5)
    assert [answer.status for answer in answers] == [200] * 3 + [402] * 2
    first.kill()
    second = start(priced, data_dir=first.data_dir)
    assert ledger.spent(second, "poor") == 3 * 13
    assert post(second, SHORT, key).status == 402
    second.command("keys", "update", "poor", "--budget", "0.001")
    assert post(second, SHORT, key).status == 200


# Temporary tokens


def test_a_token_s_models_and_length_hold_everywhere(service: Service, upstream: ChatUpstream):
    service.new_key("owner")
    made = json.loads(service.command("keys", "token", "owner", "--max-tokens", "3", "--json"))
    token = made["token"]
    for given, sent in [
        ({}, {"max_tokens": 3}),
        ({"max_tokens": 2}, {"max_tokens": 2}),
        ({"max_completion_tokens": 9}, {"max_completion_tokens": 3}),
        ({"max_tokens": 9, "max_completion_tokens": 9}, {"max_tokens": 3, "max_completion_tokens": 3}),
    ]:
        answer = post(service, chat("relay", **given), token)
        body = json.loads(upstream.request().body)
        assert {name: value for name, value in body.items() if name.startswith("max_")} == sent
    assert row_of(service, answer)["token_id"] == made["token_id"]
    prompt = {"model": "relay", "prompt": "Once", "max_tokens": 50}
    assert post(service, prompt, token, "/v1/completions").status == 200
    assert json.loads(upstream.request().body)["max_tokens"] == 3
    for path, body in [
        (PATH, chat("tiny", **LONG)),
        (PATH, chat("tiny", n=1, logit_bias=LONG["logit_bias"])),
        ("/v1/completions", {"model": "tiny", "prompt": "Once", "max_tokens": 50}),
    ]:
        assert post(service, body, token, path).json()["usage"]["completion_tokens"] == 3

    narrow = service.command("keys", "token", "owner", "--models", "relay").strip()
    assert post(service, chat("relay"), narrow).status == 200
    refused = post(service, chat("tiny"), narrow)
    assert (refused.status, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    refused = post(service, {"model": "tiny", "content": "Hello"}, narrow, "/tokenize")
    assert (refused.status, refused.json()["error"]["code"]) == (403, "model_not_allowed")
    assert post(service, chat("relay-thinking"), narrow).status == 200


def test_a_narrow_key_is_told_of_its_own_models_only(service: Service):
    def get(path: str, key: str) -> Answer:
        return call(service.port, request("GET", path, b"", key))

    def listed(key: str) -> set[str]:
        return {model["id"] for model in get("/v1/models", key).json()["data"]}

    narrow = service.new_key("narrow-lister", "--models", "relay")
    assert listed(narrow) == {"relay"}
    assert listed(str(service.key)) >= {"relay", "tiny"}
    assert get("/v1/models/relay", narrow).json()["id"] == "relay"
    hidden, unknown = get("/v1/models/tiny", narrow), get("/v1/models/none", narrow)
    assert (hidden.status, unknown.status) == (404, 404)
    assert hidden.error["message"] == unknown.error["message"].replace("none", "tiny")
    assert "tiny" not in post(service, chat("none"), narrow).error["message"]


# Where nothing can be written


def test_a_locked_database_stops_nothing(start, priced: str, upstream: ChatUpstream):
    service = start(priced)
    with closing(sqlite3.connect(service.data_dir / "ledger.db", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ids = {post(service, SHORT).headers["x-request-id"] for _ in range(10)}
        other.execute("ROLLBACK")
    assert {id for id in ids if ledger.row(service, id)["outcome"] == "ok"} == ids


def test_what_was_spent_is_known_as_soon_as_the_database_can_be_read(
    start, priced: str, upstream: ChatUpstream
):
    """It can't be at the start: a full disk or a damaged file must not make a budget new."""
    first = start(priced)
    key = first.new_key("poor", "--budget", "0.0006")
    statuses = [answer.status for answer in series(first, key, 50)]
    assert statuses.count(200) > 40
    assert statuses[-1] == 402
    assert first.stop(signal.SIGTERM) == 0
    database, aside = first.data_dir / "ledger.db", first.data_dir / "aside"
    database.rename(aside)
    database.write_bytes(b"no database" * 1000)
    second = start(priced, data_dir=first.data_dir)
    eventually(lambda: problems(second), what="the intake has a problem")
    assert post(second, SHORT, key).status == 200
    aside.replace(database)
    eventually(lambda: not problems(second), what="the intake goes on")
    spent = statuses.count(200) + 1
    while post(second, SHORT, key).status == 200:
        spent += 1
        assert spent < statuses.count(200) + 30, "a new budget would be refused after more"
        time.sleep(0.3)
    rows = ledger.rows_of_key(second, "poor", spent)
    assert ledger.spent(second, "poor") == sum(row["price"] for row in rows)


@pytest.mark.parametrize("policy", ["serve", "refuse"])
def test_without_room_for_a_journal(start, priced: str, upstream: ChatUpstream, policy: str):
    """Another worker's journal, as it looks, takes all the room there may be; then it is gone."""
    config = f'[ledger]\nwhen_unavailable = "{policy}"\nmax_journal_bytes = {2**26}\n' + priced
    first = start(config)
    kept = post(first, SHORT, first.key)
    assert first.stop(signal.SIGTERM) == 0
    with open(first.data_dir / "journal" / "other.live", "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.truncate(2**26)
        service = start(config, data_dir=first.data_dir)
        answers = [post(service, SHORT, first.key) for _ in range(3)]
        unready, problem = ready(service), problems(service)
        other.truncate(0)
    if policy == "serve":
        assert [answer.status for answer in answers] == [200] * 3
    else:
        assert {(answer.status, answer.error["code"]) for answer in answers} == {(503, "ledger_unavailable")}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in answers)

    assert unready == (200 if policy == "serve" else 503)
    assert problem
    # Nobody asks for anything meanwhile: who believes /ready sends no requests until it says so.
    eventually(lambda: not problems(service), what="ready again, without problems")
    assert row_of(service, post(service, SHORT, first.key))["outcome"] == "ok"
    rows = ledger.rows(service)
    assert kept.headers["x-request-id"] in rows
    assert not {answer.headers["x-request-id"] for answer in answers} & set(rows)


def problems(service: Service) -> list[str] | str:
    answer = call(service.port, request("GET", "/ready")).json()
    return list(answer["problems"]) if "problems" in answer else str(answer["error"]["message"])
