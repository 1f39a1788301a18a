"""Changes of keys reach every worker of a running service before the command that made them returns."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from fakes.chat_upstream import ChatUpstream
from fakes.configs import PATIENT, upstream_model
from fakes.service import Service
from fakes.wire import call, request

TRIES = 12  # connections of their own; that two workers leave one of them out is less likely than 1 in 1000


@pytest.fixture(scope="module")
def service(start, chat_upstream: ChatUpstream) -> Iterator[Service]:
    service = start(PATIENT + upstream_model("relay", chat_upstream), "--workers", "2")
    yield service
    assert service.stop() == 0


def answers(service: Service, key: str) -> set[tuple[int, str | None]]:
    """Status and error code of some requests, all the same if all workers agree."""
    found = set()
    for _ in range(TRIES):
        answer = call(service.port, request("GET", "/v1/models", b"", key))
        error = json.loads(answer.body).get("error", {})
        found.add((answer.status, error.get("code")))
    return found


GOOD = {(200, None)}


def test_disable_and_enable(service: Service):
    key = service.new_key("disabled")
    token = service.command("keys", "token", "disabled").strip()
    assert answers(service, key) == answers(service, token) == GOOD
    service.command("keys", "disable", "disabled")
    assert answers(service, key) == answers(service, token) == {(401, "key_disabled")}
    service.command("keys", "enable", "disabled")
    assert answers(service, key) == answers(service, token) == GOOD


def test_update(service: Service):
    key = service.new_key("updated")
    assert answers(service, key) == GOOD
    service.command("keys", "update", "updated", "--role", "metrics")
    [(status, _)] = answers(service, key)
    assert status == 403
    service.command("keys", "update", "updated", "--role", "user")
    assert answers(service, key) == GOOD


def test_rotate(service: Service):
    old = service.new_key("rotated")
    token = service.command("keys", "token", "rotated").strip()
    new = service.command("keys", "rotate", "rotated", "--overlap", "1h", "--quiet").strip()
    assert answers(service, old) == answers(service, new) == answers(service, token) == GOOD
    newest = service.command("keys", "rotate", "rotated", "--quiet").strip()
    assert answers(service, newest) == GOOD
    assert answers(service, new) == {(401, "key_expired")}
    assert answers(service, old) == {(401, "invalid_api_key")}
    assert answers(service, token) == {(401, "bad_signature")}


def test_delete(service: Service):
    key = service.new_key("deleted")
    token = service.command("keys", "token", "deleted").strip()
    assert answers(service, key) == answers(service, token) == GOOD
    service.command("keys", "delete", "deleted")
    assert answers(service, key) == answers(service, token) == {(401, "invalid_api_key")}


def test_a_key_expires_without_being_told(service: Service):
    key = service.new_key("short", "--expires", "2s")
    assert answers(service, key) <= {*GOOD, (401, "key_expired")}
    expires = json.loads(service.command("keys", "show", "short", "--json"))["expires"]
    while time.time() < expires:
        time.sleep(expires - time.time())
    assert answers(service, key) == {(401, "key_expired")}


def test_a_backup_of_a_running_service_serves(service: Service, start, chat_upstream: ChatUpstream, tmp_path):
    key = service.new_key("saved")
    service.command("keys", "backup", str(tmp_path / "backup"))
    restored = start(PATIENT + upstream_model("relay", chat_upstream), data_dir=tmp_path / "backup")
    assert answers(restored, key) == GOOD
    assert restored.stop() == 0
