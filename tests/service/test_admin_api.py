"""The admin API and what keys may ask of their own usage, on a service with two workers."""

from __future__ import annotations

import csv
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from deepseek_api_compat.store.ledger import open_ledger
from deepseek_api_compat.store.ledger_rows import Batch, LedgerRow
from fakes.chat_upstream import ChatUpstream
from fakes.configs import PATIENT, chat, upstream_model
from fakes.service import Service, eventually
from fakes.wire import Answer, call, request

TRIES = 12  # connections of their own; that two workers leave one of them out is less likely than 1 in 1000
KEYS = "/admin/v1/keys"
NOON = 1_780_056_000  # 2026-05-29 12:00 UTC
HOUR = 3600
NOBODY = "aaaaaaaaaaaa"
READS = (
    KEYS,
    f"{KEYS}/{NOBODY}",
    "/admin/v1/engines",
    "/admin/v1/usage",
    "/admin/v1/requests",
    "/admin/v1/audit",
)


@pytest.fixture(scope="module")
def service(start, chat_upstream: ChatUpstream) -> Iterator[Service]:
    service = start(PATIENT + upstream_model("relay", chat_upstream), "--workers", "2")
    yield service
    assert service.stop() == 0


def ask(service: Service, method: str, path: str, body: Any = b"", key: str | None = None) -> Answer:
    return call(service.port, request(method, path, body, key or service.key))


def done(service: Service, method: str, path: str, body: Any = b"", key: str | None = None) -> Any:
    answer = ask(service, method, path, body, key)
    assert answer.status == 200, answer
    assert answer.headers["cache-control"] == "no-store"
    return answer.json()


def create(service: Service, **fields: Any) -> dict[str, Any]:
    return dict(done(service, "POST", KEYS, {"name": "made", **fields}))


def statuses(service: Service, key: str) -> set[int]:
    """What all workers say to this key."""
    return {ask(service, "GET", "/v1/models", key=key).status for _ in range(TRIES)}


def newest_entry(service: Service) -> dict[str, Any]:
    [entry] = done(service, "GET", "/admin/v1/audit?limit=1")["data"]
    return dict(entry)


class TestKeys:
    def test_a_key_is_good_at_every_worker_when_its_creation_returns(self, service: Service) -> None:
        for _ in range(5):
            assert statuses(service, create(service)["api_key"]) == {200}

    def test_a_created_key_has_all_that_was_asked_for(self, service: Service) -> None:
        fields = {
            "name": "小明",
            "owner": "Ops <ops@example.com>",
            "expires": int(time.time()) + 1000,
            "models": ["relay"],
            "networks": ["127.0.0.0/8"],
            "budget": "12.5",
        }
        made = create(service, **fields, limits={"rps": 5})
        assert made["object"] == "key"
        assert {name: made[name] for name in fields} == fields
        assert made["limits"]["rps"] == 5
        got = done(service, "GET", f"{KEYS}/{made['id']}")
        assert got == {name: value for name, value in made.items() if name not in ("api_key", "secret_key")}
        assert got in done(service, "GET", KEYS)["data"]

    def test_a_change_holds_at_every_worker_when_it_returns(self, service: Service) -> None:
        made = create(service)
        place = f"{KEYS}/{made['id']}"
        assert done(service, "POST", f"{place}/disable")["enabled"] is False
        assert statuses(service, made["api_key"]) == {401}
        assert done(service, "POST", f"{place}/enable")["enabled"] is True
        assert statuses(service, made["api_key"]) == {200}
        assert done(service, "PATCH", place, {"name": "renamed", "role": "metrics"})["name"] == "renamed"
        assert statuses(service, made["api_key"]) == {403}
        done(service, "PATCH", place, {"role": "user"})
        rotated = done(service, "POST", f"{place}/rotate", {"overlap": 60})
        assert statuses(service, made["api_key"]) == statuses(service, rotated["api_key"]) == {200}
        assert done(service, "DELETE", place) == {"object": "key", "id": made["id"], "deleted": True}
        assert statuses(service, made["api_key"]) == statuses(service, rotated["api_key"]) == {401}
        assert ask(service, "GET", place).status == 404

    def test_a_token_made_for_a_key(self, service: Service) -> None:
        made = create(service)
        token = done(service, "POST", f"{KEYS}/{made['id']}/token", {"expires_in": 60, "models": ["relay"]})
        assert token["object"] == "token"
        assert statuses(service, token["token"]) == {200}

    def test_changes_at_the_same_time_all_hold(self, service: Service) -> None:
        """Each publishes the whole table; none may bring back an older one."""
        made: list[dict[str, Any]] = []
        makers = [threading.Thread(target=lambda: made.append(create(service))) for _ in range(16)]
        for maker in makers:
            maker.start()
        for maker in makers:
            maker.join()
        assert len(made) == 16
        for key in made:
            assert statuses(service, key["api_key"]) == {200}

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "name"),
            ({"name": ""}, "name"),
            ({"name": 7}, "name"),
            ({"name": "a", "colour": "red"}, "colour"),
            ({"name": "a", "key": NOBODY}, "key"),
            ({"name": "a", "role": "king"}, "role"),
            ({"name": "a", "expires": 1}, "expires"),
            ({"name": "a", "limits": {"rps": -1}}, "limits.rps"),
            ({"name": "a", "limits": {"speed": 1}}, "limits.speed"),
            ({"name": "a", "networks": ["everywhere"]}, "networks"),
            ({"name": "a", "budget": "a lot"}, "budget"),
            (b"", "name"),
            (b"[]", None),
            (b"{", None),
            (b'{"name": "' + b"a" * 70_000 + b'"}', None),
        ],
    )
    def test_wrong_fields_are_named(self, service: Service, body: Any, param: str | None) -> None:
        before = len(done(service, "GET", KEYS)["data"])
        answer = ask(service, "POST", KEYS, body)
        assert answer.status == (413 if len(body) > 65536 else 400), answer
        assert answer.error["type"] == "invalid_request_error"
        assert answer.error["param"] == param
        assert len(done(service, "GET", KEYS)["data"]) == before

    @pytest.mark.parametrize(
        ("method", "path", "status", "allowed"),
        [
            ("GET", f"{KEYS}/{NOBODY}", 404, None),
            ("PATCH", f"{KEYS}/{NOBODY}", 400, None),
            ("DELETE", f"{KEYS}/{NOBODY}", 404, None),
            ("POST", f"{KEYS}/{NOBODY}/rotate", 404, None),
            ("GET", f"{KEYS}/admin", 404, None),  # a name is no id
            ("DELETE", f"{KEYS}/..", 404, None),
            ("POST", f"{KEYS}/{NOBODY}/explode", 404, None),
            ("POST", f"{KEYS}/{NOBODY}/rotate/twice", 404, None),
            ("POST", f"{KEYS}/{NOBODY}", 405, "GET, PATCH, DELETE"),
            ("GET", f"{KEYS}/{NOBODY}/rotate", 405, "POST"),
            ("DELETE", KEYS, 405, "GET, POST"),
        ],
    )
    def test_what_is_not_there(
        self, service: Service, method: str, path: str, status: int, allowed: str | None
    ) -> None:
        answer = ask(service, method, path)
        assert (answer.status, answer.headers.get("allow")) == (status, allowed), answer
        assert answer.error["message"]


class TestWhoMay:
    @pytest.mark.parametrize("path", READS)
    def test_only_keys_of_admins(self, service: Service, path: str) -> None:
        assert call(service.port, request("GET", path)).status == 401
        for role in ("user", "metrics"):
            answer = ask(service, "GET", path, key=create(service, role=role)["api_key"])
            assert (answer.status, answer.error["type"]) == (403, "permission_error")

    @pytest.mark.parametrize("method", ["POST", "PATCH", "DELETE"])
    def test_a_user_changes_nothing(self, service: Service, method: str) -> None:
        user = create(service)
        for path in (KEYS, f"{KEYS}/{user['id']}", f"{KEYS}/{user['id']}/rotate"):
            assert ask(service, method, path, {"name": "x", "role": "admin"}, user["api_key"]).status == 403
        assert statuses(service, user["api_key"]) == {200}

    @pytest.mark.parametrize("path", READS)
    def test_no_temporary_token_of_an_admin(self, service: Service, path: str) -> None:
        """A token that may do less could make itself a key that may do all."""
        admin = create(service, role="admin")
        token = done(service, "POST", f"{KEYS}/{admin['id']}/token")["token"]
        answer = ask(service, "GET", path, key=token)
        assert answer.status == 403, answer
        assert ask(service, "POST", KEYS, {"name": "x"}, token).status == 403

    @pytest.mark.parametrize("prefix", ["/v1", "/beta", "/compat/v1", "/v1/compat"])
    def test_under_no_prefix(self, service: Service, prefix: str) -> None:
        assert ask(service, "GET", prefix + KEYS).error["code"] == "route_not_found"


class TestAudit:
    def test_what_is_done_over_http_names_the_key_and_the_request(self, service: Service) -> None:
        admin = create(service, name="boss", role="admin")
        answer = ask(service, "POST", KEYS, {"name": "noted", "owner": "x"}, admin["api_key"])
        entry = newest_entry(service)
        assert entry["actor"] == {
            "kind": "key",
            "id": admin["id"],
            "request_id": answer.headers["x-request-id"],
        }
        assert (entry["op"], entry["key_id"], entry["key_name"]) == (
            "keys.create",
            answer.json()["id"],
            "noted",
        )
        assert entry["changes"]["owner"] == "x"
        assert abs(entry["at"] / 1000 - time.time()) < 60

    def test_what_is_done_by_a_command_names_the_user(self, service: Service) -> None:
        service.command("keys", "create", "commanded", "--quiet")
        service.command("keys", "delete", "commanded")
        entry = newest_entry(service)
        assert entry["actor"] == {"kind": "user", "id": str(os.getuid()), "request_id": None}
        assert (entry["op"], entry["key_name"]) == ("keys.delete", "commanded")

    def test_pages(self, service: Service) -> None:
        for _ in range(3):
            create(service)
        first = done(service, "GET", "/admin/v1/audit?limit=2")
        second = done(service, "GET", f"/admin/v1/audit?limit=1&after={first['next']}")
        numbers = [entry["number"] for entry in (*first["data"], *second["data"])]
        assert numbers == sorted(numbers, reverse=True)
        assert len(set(numbers)) == 3

    def test_nothing_changes_it(self, service: Service) -> None:
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert ask(service, method, "/admin/v1/audit").status == 405


def test_engines(service: Service) -> None:
    [engine] = done(service, "GET", "/admin/v1/engines")["data"]
    assert (engine["object"], engine["model"], engine["kind"]) == ("engine", "relay", "openai")
    assert engine["state"] == "ready"


def row(id: str, key_id: str, started: float, **fields: Any) -> LedgerRow:
    values: dict[str, Any] = {
        "key_id": key_id,
        "token_id": None,
        "endpoint": "/chat/completions",
        "model": "relay",
        "replica": 0,
        "status": 200,
        "outcome": "ok",
        "error_code": None,
        "finish": "stop",
        "queue_ms": 1,
        "ttft_ms": 20,
        "total_ms": 300,
        "prompt_tokens": 100,
        "cached_tokens": 40,
        "completion_tokens": 10,
        "reasoning_tokens": 3,
        "sent_tokens": 10,
        "price": 1_500_000,
        **fields,
    }
    return LedgerRow(request_id=id, started=int(started * 1000), **values)


@pytest.fixture(scope="module")
def alice(service: Service) -> dict[str, Any]:
    """A key with a budget of 10 and four requests, beside a request of another's."""
    alice = create(service, name="alice", budget="10")
    rows = [
        row("req-1", alice["id"], NOON),
        row(
            "req-2", alice["id"], NOON + 60, outcome="error", status=502, error_code="engine_failed", price=0
        ),
        row("req-3", alice["id"], NOON + HOUR, model="other", price=250_000),
        row("req-4", alice["id"], NOON + 24 * HOUR),
        row("req-5", NOBODY, NOON),
    ]
    ledger = open_ledger(service.data_dir)
    ledger.take_in(Batch("test", "test.log", 0, 1, rows, []))
    ledger.close()
    return alice


PERIOD = f"from={NOON}&to={NOON + 48 * HOUR}"


class TestUsage:
    def test_of_one_s_own(self, service: Service, alice: dict[str, Any]) -> None:
        answer = done(service, "GET", f"/v1/usage?{PERIOD}&group_by=model", key=alice["api_key"])
        assert {name: answer[name] for name in ("object", "from", "to", "group_by", "currency")} == {
            "object": "list",
            "from": NOON,
            "to": NOON + 48 * HOUR,
            "group_by": ["model"],
            "currency": "USD",
        }
        other, relay = answer["data"]
        assert relay == {
            "model": "relay",
            "requests": 3,
            "prompt_tokens": 300,
            "cached_tokens": 120,
            "completion_tokens": 30,
            "reasoning_tokens": 9,
            "price": "3",
            "outcomes": {"ok": 2, "error": 1},
        }
        assert (other["model"], other["price"]) == ("other", "0.25")

    def test_by_hour_and_by_day(self, service: Service, alice: dict[str, Any]) -> None:
        def sums(query: str) -> list[tuple[int, int]]:
            answer = done(service, "GET", f"/v1/usage?{query}", key=alice["api_key"])
            return [(one["start"], one["requests"]) for one in answer["data"]]

        midnight = NOON - 12 * HOUR
        assert sums(f"{PERIOD}&group_by=day") == [(midnight, 3), (midnight + 24 * HOUR, 1)]
        assert sums(f"{PERIOD}&group_by=hour") == [(NOON, 2), (NOON + HOUR, 1), (NOON + 24 * HOUR, 1)]
        assert sums("from=2026-05-29&to=2026-05-30T00:00Z&group_by=hour") == [(NOON, 2), (NOON + HOUR, 1)]
        assert sums(f"{PERIOD}&group_by=day&model=other") == [(midnight, 1)]

    def test_nobody_sees_another_s(self, service: Service, alice: dict[str, Any]) -> None:
        stranger = create(service)["api_key"]
        assert done(service, "GET", f"/v1/usage?{PERIOD}", key=stranger)["data"] == []
        for query in (f"key={alice['id']}", f"key_id={alice['id']}", "group_by=key"):
            assert ask(service, "GET", f"/v1/usage?{PERIOD}&{query}", key=stranger).status == 400

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("from=yesterday", "from"),
            ("to=-1", "to"),
            ("from=2026-05-02&to=2026-05-01", "from"),
            ("from=2020-01-01&to=2026-01-01", "from"),
            ("from=2026-01-01&to=2026-12-01&group_by=hour", "from"),
            ("group_by=minute", "group_by"),
            ("group_by=hour,day", "group_by"),
            ("group_by=model,model", "group_by"),
            ("group_by=", "group_by"),
            ("model=", "model"),
            ("since=1", "since"),
            ("from=1&from=2", "from"),
        ],
    )
    @pytest.mark.parametrize("path", ["/v1/usage", "/admin/v1/usage"])
    def test_a_wrong_parameter_is_named(self, service: Service, path: str, query: str, param: str) -> None:
        answer = ask(service, "GET", f"{path}?{query}")
        assert (answer.status, answer.error["param"]) == (400, param)

    def test_of_all_keys_for_admins(self, service: Service, alice: dict[str, Any]) -> None:
        answer = done(service, "GET", f"/admin/v1/usage?{PERIOD}&group_by=key")
        assert {one["key_id"]: one["requests"] for one in answer["data"]} == {alice["id"]: 4, NOBODY: 1}
        answer = done(service, "GET", f"/admin/v1/usage?{PERIOD}&key={NOBODY}&group_by=day,key,model")
        assert [(one["key_id"], one["model"]) for one in answer["data"]] == [(NOBODY, "relay")]

    def test_as_csv(self, service: Service, alice: dict[str, Any]) -> None:
        query = f"{PERIOD}&group_by=model,day&key={alice['id']}&format=csv"
        answer = ask(service, "GET", f"/admin/v1/usage?{query}")
        assert answer.headers["content-type"] == "text/csv; charset=utf-8"
        found = list(csv.DictReader(io.StringIO(answer.body.decode())))
        assert [(one["model"], one["requests"], one["price"], one["error"]) for one in found] == [
            ("other", "1", "0.25", "0"),
            ("relay", "2", "1.5", "1"),
            ("relay", "1", "1.5", "0"),
        ]


def test_a_request_counts_soon_after_its_end(service: Service) -> None:
    made = create(service, budget="1")

    def requests() -> int:
        answer = done(service, "GET", "/v1/usage", key=made["api_key"])
        return sum(one["requests"] for one in answer["data"])

    assert requests() == 0
    assert ask(service, "POST", "/v1/chat/completions", chat("relay"), made["api_key"]).status == 200
    eventually(lambda: requests() == 1, what="the request in the usage")
    [row] = done(service, "GET", f"/admin/v1/requests?key={made['id']}")["data"]
    assert (row["model"], row["outcome"], row["prompt_tokens"]) == ("relay", "ok", 7)


class TestRequests:
    def test_rows_newest_first(self, service: Service, alice: dict[str, Any]) -> None:
        answer = done(service, "GET", f"/admin/v1/requests?{PERIOD}")
        assert [one["request_id"] for one in answer["data"]] == ["req-4", "req-3", "req-2", "req-5", "req-1"]
        assert answer["next"] is None
        failed = answer["data"][2]
        assert (failed["object"], failed["status"], failed["error_code"]) == ("request", 502, "engine_failed")
        assert answer["data"][1]["price"] == "0.25"

    def test_pages(self, service: Service, alice: dict[str, Any]) -> None:
        found: list[str] = []
        after = ""
        while True:
            page = done(service, "GET", f"/admin/v1/requests?{PERIOD}&limit=2{after}")
            found += [one["request_id"] for one in page["data"]]
            if page["next"] is None:
                break
            after = f"&after={page['next']}"
        assert found == ["req-4", "req-3", "req-2", "req-5", "req-1"]

    def test_filters(self, service: Service, alice: dict[str, Any]) -> None:
        def ids(query: str) -> list[str]:
            answer = done(service, "GET", f"/admin/v1/requests?{PERIOD}&{query}")
            return [one["request_id"] for one in answer["data"]]

        assert ids(f"key={NOBODY}") == ["req-5"]
        assert ids("model=other") == ["req-3"]
        assert ids("outcome=error") == ["req-2"]

    @pytest.mark.parametrize(
        "query", ["after=x", "after=1.", "limit=0", "limit=1001", "outcome=fine", "key="]
    )
    def test_a_wrong_parameter_is_named(self, service: Service, query: str) -> None:
        answer = ask(service, "GET", f"/admin/v1/requests?{query}")
        assert (answer.status, answer.error["param"]) == (400, query.split("=")[0])


class TestBalance:
    @pytest.mark.parametrize("path", ["/user/balance", "/v1/user/balance"])
    def test_is_the_budget_less_what_was_spent(
        self, service: Service, alice: dict[str, Any], path: str
    ) -> None:
        assert done(service, "GET", path, key=alice["api_key"]) == {
            "is_available": True,
            "balance_infos": [
                {
                    "currency": "USD",
                    "total_balance": "6.75",
                    "granted_balance": "6.75",
                    "topped_up_balance": "0.00",
                }
            ],
        }

    def test_a_used_up_budget(self, service: Service, alice: dict[str, Any]) -> None:
        done(service, "PATCH", f"{KEYS}/{alice['id']}", {"budget": "3.25"})
        try:
            answer = done(service, "GET", "/user/balance", key=alice["api_key"])
        finally:
            done(service, "PATCH", f"{KEYS}/{alice['id']}", {"budget": "10"})
        assert answer["is_available"] is False
        assert answer["balance_infos"][0]["total_balance"] == "0.00"

    def test_without_a_budget(self, service: Service) -> None:
        answer = done(service, "GET", "/user/balance", key=create(service)["api_key"])
        assert answer == {"is_available": True, "balance_infos": []}


def test_a_supervisor_that_does_not_answer(start, chat_upstream: ChatUpstream) -> None:
    service = start(PATIENT + upstream_model("relay", chat_upstream))
    service.process.send_signal(signal.SIGSTOP)
    try:
        answer = ask(service, "GET", KEYS)
        assert (answer.status, answer.error["code"]) == (503, "operation_failed")
        assert ask(service, "GET", "/v1/models").status == 200, "what needs no supervisor goes on"
    finally:
        service.process.send_signal(signal.SIGCONT)
    assert ask(service, "GET", KEYS).status == 200
    assert service.stop() == 0
