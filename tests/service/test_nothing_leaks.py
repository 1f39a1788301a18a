"""A day of good and bad requests; then every place where something could have been left is searched.

Keys, tokens, secrets and what users write are nowhere but in the answers to those who sent or asked for them:
not in files of the data directory, logs, metrics, other clients' errors, exports, or what `ps` shows.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from fakes.chat_upstream import ChatUpstream, event, replying, streaming
from fakes.configs import ENGINE, PATIENT, UPSTREAM_KEY, chat, upstream_model
from fakes.http_server import ok
from fakes.observe import descendants, log_of
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request

PATH = "/v1/chat/completions"
KEYS = "/admin/v1/keys"
CANARY = "canary7f3aprompt"
LOG = """
[log]
level = "debug"
format = "json"
requests = true
"""
TOOL = {
    "type": "function",
    "function": {
        "name": "f",
        "description": CANARY,
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "string", "enum": [CANARY, "b"]}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
FORCED = {"tools": [TOOL], "tool_choice": "required", "max_tokens": 40}


class Day:
    """What happened: the service, every secret that was made or sent, and the ids that may be seen."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.secrets: dict[str, str] = {"the prompt": CANARY, "the upstream's key": UPSTREAM_KEY}
        self.key_ids: set[str] = set()
        self.request_ids: set[str] = set()
        self.learn("admin", {"api_key": service.key})

    def learn(self, name: str, made: dict[str, Any]) -> dict[str, Any]:
        """Keep the secrets of an answer; of a key and a token the part that is secret by itself too."""
        for field in ("api_key", "secret_key", "token"):
            if field in made:
                self.secrets[f"{field} of {name}"] = re.split("[.]|DSK-.*-", made[field])[-1]
        if "id" in made:
            self.key_ids.add(made["id"])
        return made

    def send(self, method: str, path: str, body: Any = b"", key: str | None = None, *headers: str) -> Answer:
        answer = call(self.service.port, request(method, path, body, key, *headers))
        self.request_ids.add(answer.headers.get("x-request-id", "none"))
        return answer

    def admin(self, method: str, path: str, body: Any = b"") -> Any:
        answer = self.send(method, path, body, self.service.key)
        assert answer.status == 200, answer
        return answer.json()

    def found_in(self, data: bytes) -> list[str]:
        """Which secrets are in there."""
        return [name for name, secret in self.secrets.items() if secret.encode() in data]


@pytest.fixture(scope="module")
def day(start, chat_upstream: ChatUpstream) -> Iterator[Day]:
    models = ENGINE + upstream_model("relay", chat_upstream)
    service = start(PATIENT + LOG + models, "--workers", "2")
    day = Day(service)
    alice = day.learn("alice", day.admin("POST", KEYS, {"name": "alice", "budget": "10"}))
    good_requests(day, alice["api_key"])
    wrong_keys(day, alice)
    wrong_requests(day, alice["api_key"])
    wrong_admin_requests(day, alice)
    faults_of_the_upstream(day, chat_upstream, alice["api_key"])
    rotated_and_deleted(day, alice)
    deaths(day, alice["id"])
    Wire.close_all()
    eventually(lambda: written(day), what="the ledger's rows and the log's lines")
    time.sleep(1.5)  # two rounds of the intake, and what is written each second
    yield day
    assert service.stop() == 0


def outcomes(day: Day) -> set[str]:
    with closing(sqlite3.connect(day.service.data_dir / "ledger.db")) as connection:
        return {outcome for (outcome,) in connection.execute("SELECT DISTINCT outcome FROM ledger")}


def logged(day: Day) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log_of(day.service).splitlines()]


def written(day: Day) -> bool:
    """Whether what the test below looks for has come from all processes."""
    ids = {line["request_id"] for line in logged(day) if "request_id" in line}
    return ids >= day.request_ids - {"none"} and outcomes(day) >= OUTCOMES


OUTCOMES = {"ok", "error", "engine_lost", "gateway_lost"}


def good_requests(day: Day, key: str) -> None:
    for model in ("tiny", "relay"):
        for stream in (False, True):
            body = chat(model, CANARY, max_tokens=3, stream=stream, user=CANARY, metadata={"note": CANARY})
            assert day.send("POST", PATH, body, key).status == 200
    assert day.send("POST", PATH, chat("tiny", CANARY, **FORCED), key).status == 200
    assert day.send("POST", PATH, chat("tiny", CANARY, **FORCED, stream=True), key).status == 200
    completion = {"model": "tiny", "prompt": CANARY, "max_tokens": 2, "stop": [CANARY]}
    assert day.send("POST", "/v1/completions", completion, key).status == 200
    assert day.send("POST", "/v1/tokenize", {"model": "tiny", "content": CANARY}, key).status == 200
    for path in ("/v1/models", "/v1/usage", "/user/balance"):
        assert day.send("GET", path, b"", key).status == 200


def wrong_keys(day: Day, alice: dict[str, Any]) -> None:
    """Nearly right keys and tokens, keys in the wrong place."""
    key, secret = alice["api_key"], alice["secret_key"]
    token = day.learn("a token", day.admin("POST", f"{KEYS}/{alice['id']}/token", {"expires_in": 600}))[
        "token"
    ]
    assert day.send("GET", "/v1/models", b"", token).status == 200
    for wrong in (
        key[:-1] + "!",
        key + "x",
        secret,
        token[:-2],
        token + "x",
        token + ".x",
        CANARY,
        "DSK-" + CANARY,
    ):
        assert day.send("GET", "/v1/models", b"", wrong).status == 401
    for header in (
        f"Authorization: Basic {key}",
        f"Authorization: {key}",
        f"x-goog-key: {key}",
        f"Cookie: {key}",
    ):
        assert day.send("GET", "/v1/models", b"", None, header).status == 401
    for path in (f"/v1/models?api_key={key}", f"/{key}", f"/{token}/{CANARY}"):
        assert day.send("GET", path).status == 401
        assert day.send("GET", path, b"", key).status in (200, 404)


def wrong_requests(day: Day, key: str) -> None:
    """Wrong in every place that has a word to say about it, with what is secret in that place."""
    bodies: list[Any] = [
        CANARY.encode(),
        b'{"model": "tiny", "messages": "' + CANARY.encode(),
        chat(CANARY),
        chat(key),
        chat("tiny", CANARY, temperature=CANARY),
        chat("tiny", CANARY, response_format={"type": CANARY}),
        chat("tiny", CANARY, tools=[{**TOOL, "type": CANARY}]),
        chat("tiny", CANARY, tool_choice={"type": "function", "function": {"name": CANARY}}),
        chat("tiny", CANARY * 1000),
        {"model": "tiny", "messages": [{"role": CANARY, "content": key}]},
        {"model": "tiny", "messages": [{"role": "tool", "tool_call_id": CANARY, "content": key}]},
        {"model": "tiny", "messages": [{"role": "user", "content": [{"type": CANARY, CANARY: key}]}]},
    ]
    for body in bodies:
        for stream in (False, True):
            if isinstance(body, dict):
                body = {**body, "stream": stream}
            assert day.send("POST", PATH, body, key).status in (400, 404), body
    for path in (
        f"/v1/models/{CANARY}",
        f"/v1/{CANARY}",
        f"/v1/usage?{CANARY}={CANARY}",
        f"/v1/usage?from={CANARY}",
    ):
        assert day.send("GET", path, b"", key).status in (400, 404)
    assert day.send("PUT", PATH, CANARY.encode(), key).status == 405
    odd = f"{CANARY}: {CANARY}"
    assert day.send(
        "GET", "/v1/models", b"", key, odd, f"x-request-id: {CANARY}", f"Host: {CANARY}"
    ).status in (200, 400)
    with Wire(day.service.port) as wire:  # no HTTP at all
        wire.send(f"{CANARY} {key} nonsense\r\n\r\n".encode()).ended()


def wrong_admin_requests(day: Day, alice: dict[str, Any]) -> None:
    """Secrets in the fields of an operator who mixed up the windows."""
    key = alice["api_key"]
    wrong: list[Any] = [
        {"name": "a", "role": key},
        {"name": "a", key: CANARY},
        {"name": "a", "networks": [key]},
        {"name": "a", "budget": key},
        {"name": "a", "expires": CANARY},
        {"name": "a", "limits": {key: 1}},
        {"name": key * 3},
        CANARY.encode(),
    ]
    for body in wrong:
        assert day.send("POST", KEYS, body, day.service.key).status == 400
    place = f"{KEYS}/{alice['id']}"
    assert day.send("POST", f"{place}/rotate", {"overlap": CANARY}, day.service.key).status == 400
    assert day.send("POST", f"{place}/token", {"models": [CANARY, ""]}, day.service.key).status == 400
    assert day.send("GET", f"{KEYS}/{key}", b"", day.service.key).status == 404
    assert day.send("POST", KEYS, {"name": CANARY}, key).status == 403
    for query in (f"group_by={CANARY}", f"{CANARY}=1"):
        assert day.send("GET", f"/admin/v1/usage?{query}", b"", day.service.key).status == 400


def faults_of_the_upstream(day: Day, upstream: ChatUpstream, key: str) -> None:
    """An upstream whose errors quote the prompt and the key that it was sent."""
    error = json.dumps({"error": {"message": CANARY, "type": CANARY, "code": CANARY, "param": UPSTREAM_KEY}})
    broken = b"data: " + error.encode() + b"\n\n"
    plays = [
        *(replying(ok(error.encode(), status=f"{status} Status")) for status in (400, 401, 429, 500, 503)),
        replying(ok(CANARY.encode())),
        streaming(event("a"), broken),
        streaming(event("a"), b'data: {"choices": [], "usage": "' + CANARY.encode() + b'"}\n\n'),
        streaming(event("a"), end=False),
    ]
    for play in plays:
        for stream in (False, True):
            upstream.play(play)
            day.send("POST", PATH, chat("relay", CANARY, stream=stream), key)


def rotated_and_deleted(day: Day, alice: dict[str, Any]) -> None:
    place = f"{KEYS}/{alice['id']}"
    day.learn("alice, rotated", day.admin("POST", f"{place}/rotate", {"overlap": 60}))
    bob = day.learn("bob", day.admin("POST", KEYS, {"name": "bob", "role": "metrics"}))
    assert day.send("POST", PATH, chat("tiny", CANARY), bob["api_key"]).status == 403
    day.admin("DELETE", f"{KEYS}/{bob['id']}")
    assert day.send("POST", PATH, chat("tiny", CANARY), bob["api_key"]).status == 401
    carol = json.loads(day.service.command("keys", "create", "carol", "--json"))
    day.learn("carol", carol)
    made = json.loads(day.service.command("keys", "token", "carol", "--json"))
    day.learn("a token of carol's", made)
    assert day.send("POST", PATH, chat("tiny", CANARY, max_tokens=2), made["token"]).status == 200


def deaths(day: Day, alice: str) -> None:
    """The workers and the engine are killed while they write answers."""
    service = day.service
    key = day.learn("alice, again", day.admin("POST", f"{KEYS}/{alice}/rotate"))["api_key"]
    endless = chat("tiny", CANARY, stream=True, max_tokens=1500, logit_bias={"2": -100})
    [engine] = [one for one in day.admin("GET", "/admin/v1/engines")["data"] if one["pid"]]
    for victims in (service.workers(), [engine["pid"]]):
        streams = [Wire(service.port).send(request("POST", PATH, endless, key)) for _ in range(2)]
        for stream in streams:
            stream.head()
            stream.chunk()
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        for stream in streams:
            stream.reset()
        eventually(lambda victims=victims: all_well(service, victims), what="all is well again")


def all_well(service: Service, victims: list[int]) -> bool:
    """Whether others are in the place of those that were killed."""
    engines = service.engines()
    alive = {*service.workers(), *(engine["pid"] for engine in engines)}
    ready = all(engine["state"] == "ready" for engine in engines)
    return ready and len(service.workers()) == 2 and not alive & set(victims)


def files(day: Day) -> list[Path]:
    return [path for path in day.service.data_dir.rglob("*") if path.is_file()]


def test_the_day_left_what_may_be_left(day: Day) -> None:
    """Or else the searches below would find nothing in empty places."""
    everything = b"".join(path.read_bytes() for path in files(day))
    assert all(id.encode() in everything for id in day.key_ids)
    assert written(day)
    assert {"request", "request failed"} <= {line["message"] for line in logged(day)}
    assert len(day.secrets) >= 15
    assert min(map(len, day.secrets.values())) >= 16


def test_nothing_in_the_files_of_the_data_directory(day: Day) -> None:
    found = {path.name: day.found_in(path.read_bytes()) for path in files(day)}
    assert {name: secrets for name, secrets in found.items() if secrets} == {}
    assert {"gateway.log", "deepseek.db", "ledger.db", "master.key"} <= set(found)


def test_the_master_key_is_in_its_own_file_only(day: Day) -> None:
    file = day.service.data_dir / "master.key"
    master = file.read_text().split()[0]
    assert len(master) >= 64
    for path in files(day):
        if path != file:
            data = path.read_bytes()
            assert master.encode() not in data, path
            assert bytes.fromhex(master) not in data, path


def test_nothing_in_metrics(day: Day) -> None:
    text = day.send("GET", "/metrics", b"", day.service.key).body
    assert b"deepseek_requests_total" in text
    assert day.found_in(text) == []


def test_nothing_in_what_operators_read(day: Day) -> None:
    answers = [
        day.send("GET", path, b"", day.service.key).body
        for path in (KEYS, "/admin/v1/audit", "/admin/v1/requests?limit=1000", "/admin/v1/engines")
    ]
    assert all(b'"data":[{' in body for body in answers)
    for command in (
        ("keys", "list", "--json"),
        ("keys", "audit"),
        ("ledger", "export", "-"),
        ("ledger", "export", "-", "--format", "jsonl"),
        ("ledger", "summary", "--by", "model", "--by", "key"),
        ("engines", "list", "--json"),
    ):
        answers.append(day.service.command(*command).encode())
    assert [day.found_in(body) for body in answers] == [[]] * len(answers)


def test_nothing_in_errors_of_others(day: Day) -> None:
    """Another client's mistakes are answered without a word of what somebody else sent."""
    other = day.service.new_key("other")
    bodies = [
        day.send("POST", PATH, b"{", other).body,
        day.send("POST", PATH, chat("nothing"), other).body,
        day.send("POST", PATH, chat("tiny", "x" * 100_000), other).body,
        day.send("GET", "/v1/models/nothing", b"", other).body,
        day.send("GET", "/v1/models", b"", "DSK-wrong").body,
        day.send("GET", KEYS, b"", other).body,
        day.send("GET", "/nothing", b"", other).body,
    ]
    assert all(b'"error"' in body for body in bodies)
    assert [day.found_in(body) for body in bodies] == [[]] * len(bodies)


def test_nothing_in_command_lines_and_environments(day: Day) -> None:
    pids = {day.service.process.pid, *descendants(day.service.process.pid)}
    assert len(pids) >= 4  # supervisor, two workers, the engine
    for pid in pids:
        assert day.found_in(Path(f"/proc/{pid}/cmdline").read_bytes()) == []
        # The upstream's key is there because its owner gave it so.
        environment = Path(f"/proc/{pid}/environ").read_bytes()
        assert day.found_in(environment.replace(UPSTREAM_KEY.encode(), b"")) == []


def test_the_terminal_saw_the_first_key_once_and_nothing_else(day: Day) -> None:
    assert day.service.key is not None
    lines = [line for line in day.service.output.splitlines() if day.found_in(line.encode())]
    assert [line.strip().split()[0] for line in lines] == ["API", "-H"]  # the key, and the example call
