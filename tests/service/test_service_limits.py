"""Limits of a real service: over its workers, after a worker's death, and with a Redis beside."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from deepseek_api_compat.gateway.routes import LIMITS_PROBLEM
from fakes import redis_server as servers
from fakes.chat_upstream import STREAM_HEAD, ChatUpstream, answering_all, event, frame, replying
from fakes.configs import PATIENT, chat, upstream_model
from fakes.http_server import Peer, Request, ok
from fakes.observe import log_of, metrics
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request

PATH = "/v1/chat/completions"


def post(service: Service, key: str) -> Answer:
    return call(service.port, request("POST", PATH, chat("relay", max_tokens=1), key))


def configuration(upstream: ChatUpstream, limits: str = "", model_limits: str = "") -> str:
    return PATIENT + limits + upstream_model("relay", upstream) + model_limits


def test_workers_count_together_and_tell_what_is_left(start, upstream):
    service = start(configuration(upstream, "requests_per_minute = 6\n"), "--workers", "2")
    key = service.new_key("alice")
    began = time.monotonic()
    answers = [post(service, key) for _ in range(10)]
    elapsed = time.monotonic() - began
    assert [answer.status for answer in answers] == [200] * 6 + [429] * 4
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:6]] == list("543210")
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "requests_per_minute_exceeded"
    assert 59 - elapsed <= int(refused.headers["retry-after"]) <= 60
    assert post(service, service.new_key("bob")).status == 200


def worker_of(service: Service, wire: Wire) -> int:
    """The process that serves a connection of IPv4."""
    ends = f":{service.port:04X} ", f":{wire.socket.getsockname()[1]:04X} "
    lines = Path("/proc/net/tcp").read_text().splitlines()
    inode = next(line.split()[9] for line in lines if ends[0] in line[6:22] and ends[1] in line[20:36])
    return next(pid for pid in service.workers() if f"socket:[{inode}]" in sockets(pid))


def sockets(pid: int) -> set[str]:
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed since it was listed
            found.add(str(file.readlink()))
    return found


def wire_to_another(service: Service, worker: int) -> Wire:
    """A connection to another worker: which of them gets one is the kernel's choice."""
    for _ in range(200):
        wire = Wire(service.port)
        assert wire.send(request("GET", "/health")).answer().status == 200
        if worker_of(service, wire) != worker:
            return wire
        wire.close()
    raise AssertionError("one worker gets all connections")


def test_a_killed_worker_s_requests_run_no_more(start, upstream):
    """The other worker admits in their place at once, and long before the killed one is replaced."""
    service = start(configuration(upstream, "concurrency = 1\n"), "--workers", "2")

    async def forever(peer: Peer, request: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("begun")))
        await upstream.leave(peer)

    upstream.play(forever)
    key = service.new_key("alice", "--rps", "0")
    wire = Wire(service.port).send(request("POST", PATH, chat("relay", stream=True), key))
    wire.head()
    wire.chunk()
    upstream.play(answering_all)
    worker = worker_of(service, wire)
    other = wire_to_another(service, worker)

    def answered() -> bool:
        answer = other.send(request("POST", PATH, chat("relay"), key)).answer()
        assert answer.status == 200 or answer.error["code"] == "concurrency_exceeded", answer
        return answer.status == 200

    assert not answered()
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    eventually(answered, what="the other worker admits")
    took = time.monotonic() - killed
    print(f"{took * 1000:.0f} ms after the kill")


PRICE = '[[prices]]\nmodel = "relay"\nprompt = 0\ncached = 0\ncompletion = 1000000\n'


def lose(service: Service, upstream: ChatUpstream, key: str, tokens: int) -> None:
    """A request of which so many tokens are out when its worker is killed; until its successor serves."""

    async def part(peer: Peer, request: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("a")) * tokens)
        await upstream.leave(peer)

    upstream.play(part)
    wire = Wire(service.port).send(request("POST", PATH, chat("relay", stream=True, max_tokens=1), key))
    assert wire.head()[0] == 200
    received = 0
    while received < tokens:
        received += wire.chunk().count(b"\n\n")
    upstream.play(answering_all)
    [worker] = service.workers()
    os.kill(worker, signal.SIGKILL)
    eventually(lambda: service.workers() not in ([], [worker]), what="another worker")


def code_of(answer: Answer) -> str | None:
    return None if answer.status == 200 else str(answer.error["code"] or answer.error["type"])


def until_refused(service: Service, upstream: ChatUpstream, key: str, code: str) -> None:
    """The row of the lost request is written within a second or so, and counts from then.

    What is asked meanwhile fails, and costs nothing: so it is not this that uses up the limit.
    """
    upstream.play(replying(ok(b"{}", status="500 Oops")))
    eventually(lambda: code_of(post(service, key)) == code, what=code)


def test_what_a_killed_worker_s_requests_used_counts(start, upstream):
    service = start(configuration(upstream) + PRICE, "--workers", "1")
    daily = service.new_key("daily", "--tpd", "60", "--rps", "0")
    poor = service.new_key("poor", "--budget", "40", "--rps", "0")
    assert [post(service, key).status for key in (daily, poor)] == [200, 200]
    lose(service, upstream, daily, 50)
    until_refused(service, upstream, daily, "tokens_per_day_exceeded")
    lose(service, upstream, poor, 50)
    until_refused(service, upstream, poor, "insufficient_quota")


def test_a_model_s_budget_counts_lost_requests_and_outlives_the_service(start, upstream):
    config = configuration(upstream, model_limits="[models.limits]\nbudget = 60\n") + PRICE
    first = start(config, "--workers", "1")
    assert post(first, str(first.key)).status == 200
    lose(first, upstream, str(first.key), 58)
    until_refused(first, upstream, str(first.key), "insufficient_quota")
    first.kill()
    second = start(config, data_dir=first.data_dir)
    assert code_of(post(second, str(first.key))) == "insufficient_quota"


def test_a_killed_worker_s_use_reaches_the_redis_of_all(start, upstream):
    if servers.BINARY is None:
        pytest.skip("Redis is not installed: on Debian and Ubuntu, apt-get install redis-server")
    with TemporaryDirectory(dir="/tmp") as folder:
        server = servers.RedisServer(Path(folder))
        limits, budget = f'redis_url = "{server.url}"\n', "[models.limits]\nbudget = 60\n"
        config = configuration(upstream, limits, budget) + PRICE
        services = [start(config, "--workers", "1") for _ in range(2)]
        keys = [service.new_key("alice", "--rps", "0") for service in services]
        assert post(services[1], keys[1]).status == 200
        lose(services[0], upstream, keys[0], 58)
        until_refused(services[1], upstream, keys[1], "insufficient_quota")
        server.kill()


def test_a_service_says_that_redis_is_away_and_that_it_is_back(start, upstream):
    if servers.BINARY is None:
        pytest.skip("Redis is not installed: on Debian and Ubuntu, apt-get install redis-server")

    def said() -> tuple[int, float, list[str]]:
        answer = call(service.port, request("GET", "/ready"))
        return answer.status, metrics(service)["deepseek_limits_alone"], answer.json()["problems"]

    with TemporaryDirectory(dir="/tmp") as folder:
        server = servers.RedisServer(Path(folder))
        config = configuration(upstream, f'redis_url = "{server.url}"\n')
        service = start(config, "--workers", "1")
        assert said() == (200, 0.0, [])
        server.kill()
        away = [LIMITS_PROBLEM]
        eventually(lambda: said() == (200, 1.0, away), what="Redis is away")
        assert post(service, str(service.key)).status == 200
        assert metrics(service)["deepseek_limits_redis_failures_total"] >= 1
        server.start()
        eventually(lambda: said() == (200, 0.0, []), what="Redis is back")
        assert post(service, str(service.key)).status == 200
        assert log_of(service).count("Redis is back") >= 1
        server.kill()


def test_services_count_together_in_redis(start, upstream):
    if servers.BINARY is None:
        pytest.skip("Redis is not installed: on Debian and Ubuntu, apt-get install redis-server")
    with TemporaryDirectory(dir="/tmp") as folder:
        server = servers.RedisServer(Path(folder))
        limits = f'redis_url = "{server.url}"\n'
        config = configuration(upstream, limits, "[models.limits]\nrequests_per_minute = 4\n")
        services = [start(config), start(config)]
        keys = [service.new_key("alice") for service in services]
        statuses = [post(services[n % 2], keys[n % 2]).status for n in range(6)]
        assert statuses == [200] * 4 + [429] * 2
        server.kill()
        # Each alone now, with the whole limit.
        assert [post(service, key).status for service, key in zip(services, keys, strict=True)] == [200] * 2
