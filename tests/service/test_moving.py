"""Clients of another gateway go on with the keys that they have."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.cli import main
from fakes.chat_upstream import ChatUpstream
from fakes.configs import chat
from fakes.service import Service
from fakes.wire import Answer, call, request

MASTER = "sk-master-1234"
OLD, CAROL, LATER = (f"sk-{letter * 22}" for letter in "abc")


def keys_file(path: Path, **keys: str) -> Path:
    """An export of these keys, by name; alice may send two requests a minute."""
    path.write_text(json.dumps([_row(name, key) for name, key in keys.items()]))
    return path


def _row(name: str, key: str) -> dict[str, Any]:
    digest = hashlib.sha256(key.encode()).hexdigest()
    return {
        "token": digest,
        "key_alias": name,
        "models": ["chat"],
        "rpm_limit": 2 if name == "alice" else None,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, chat_upstream: ChatUpstream) -> Path:
    folder = tmp_path_factory.mktemp("moving")
    (folder / "litellm.yaml").write_text(f"""
model_list:
  - model_name: chat
    litellm_params: {{model: openai/their-model, api_base: "{chat_upstream.url}"}}
  - model_name: other
    litellm_params: {{model: openai/their-model, api_base: "{chat_upstream.url}"}}
general_settings: {{master_key: {MASTER}}}
""")
    return folder


def bring(folder: Path, keys: Path) -> None:
    args = ["import", "litellm", str(folder / "litellm.yaml"), "--keys", str(keys)]
    assert main([*args, "--data-dir", str(folder / "data"), "--output", str(folder / "made.toml")]) == 0


@pytest.fixture(scope="module")
def service(start, folder: Path) -> Iterator[Service]:
    bring(folder, keys_file(folder / "keys.json", alice=OLD, carol=CAROL))
    service = start((folder / "made.toml").read_text(), "--workers", "2", data_dir=folder / "data")
    yield service
    assert service.stop() == 0


def ask(service: Service, key: str, model: str = "chat") -> Answer:
    body = json.dumps(chat(model)).encode()
    return call(service.port, request("POST", "/v1/chat/completions", body, key))


def test_an_old_key_asks_within_its_models_and_its_limit(service: Service, upstream: ChatUpstream):
    assert [ask(service, OLD).status for _ in range(3)] == [200, 200, 429]
    assert json.loads(upstream.request().body)["model"] == "their-model"
    assert ask(service, OLD + "x").status == 401


def test_an_old_key_gets_no_model_that_it_could_not_use(service: Service, upstream: ChatUpstream):
    assert ask(service, CAROL).status == 200
    refused = ask(service, CAROL, "other")
    assert (refused.status, json.loads(refused.body)["error"]["code"]) == (403, "model_not_allowed")


def test_the_master_key_administers(service: Service):
    answer = call(service.port, request("GET", "/admin/v1/keys", b"", MASTER))
    assert {key["name"] for key in json.loads(answer.body)["data"]} >= {"alice", "litellm-master-key"}


def test_a_running_service_accepts_what_is_imported(service: Service, folder: Path, upstream: ChatUpstream):
    assert ask(service, LATER).status == 401
    bring(folder, keys_file(folder / "more.json", alice=OLD, bob=LATER))
    answers = [call(service.port, request("GET", "/v1/models", b"", LATER)) for _ in range(12)]
    assert {answer.status for answer in answers} == {200}
    service.command("keys", "disable", "bob")
    assert ask(service, LATER).status == 401
