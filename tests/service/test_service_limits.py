"""Limits of a real service: over its workers, after a worker's death, and with a Redis beside."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from fakes import redis_server as servers
from fakes.chat_upstream import STREAM_HEAD, ChatUpstream, answering_all, event, frame
from fakes.configs import IMPATIENT, chat, upstream_model
from fakes.http_server import Peer, Request
from fakes.service import Service, eventually
from fakes.wire import Answer, Wire, call, request

PATH = "/v1/chat/completions"


def post(service: Service, key: str) -> Answer:
    return call(service.port, request("POST", PATH, chat("relay"), key))


def configuration(upstream: ChatUpstream, limits: str = "", model_limits: str = "") -> str:
    return IMPATIENT + limits + upstream_model("relay", upstream) + model_limits


def test_workers_count_together_and_tell_what_is_left(start, upstream):
    service = start(configuration(upstream, "requests_per_minute = 6\n"), "--workers", "2")
    key = service.new_key("alice")
    answers = [post(service, key) for _ in range(10)]
    assert [answer.status for answer in answers] == [200] * 6 + [429] * 4
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers[:6]] == list("543210")
    refused = answers[-1]
    assert refused.json()["error"]["code"] == "requests_per_minute_exceeded"
    assert 50 <= int(refused.headers["retry-after"]) <= 60
    assert post(service, service.new_key("bob")).status == 200


def test_a_killed_worker_s_requests_run_no_more(start, upstream):
    service = start(configuration(upstream, "concurrency = 1\n"), "--workers", "1")

    async def forever(peer: Peer, request: Request) -> None:
        await peer.send(STREAM_HEAD + frame(event("begun")))
        await upstream.leave(peer)

    upstream.play(forever)
    key = service.new_key("alice")
    wire = Wire(service.port).send(request("POST", PATH, chat("relay", stream=True), key))
    wire.head()
    wire.chunk()
    assert post(service, key).json()["error"]["code"] == "concurrency_exceeded"
    upstream.play(answering_all)
    [worker] = service.workers()
    os.kill(worker, signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: service.workers() not in ([], [worker]), what="another worker")
    assert post(service, key).status == 200
    assert time.monotonic() - killed < 5


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
