from __future__ import annotations

import pytest

from deepseek_api_compat import config
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fetch, hub
from deepseek_api_compat.models.catalogue import Hub
from fakes.hub import FakeHub, sha256

FILES = {"config.json": b"{}", "sub/a b+c.safetensors": b"weights", "tokenizer.json": b"[]"}


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_a_listing_has_every_file_with_size_and_hash(fake_hub: FakeHub, name: Hub) -> None:
    fake_hub.files.update(FILES)
    with fetch.client() as http:
        listed = hub.named(name).files(http, "org/model")
    assert {remote.path: (remote.bytes, remote.sha256) for remote in listed} == {
        path: (len(data), sha256(data)) for path, data in FILES.items()
    }


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
@pytest.mark.parametrize("path", ["../../.ssh/authorized_keys", "/etc/passwd", "a\\..\\b", ""])
def test_a_hub_may_not_write_outside_the_folder(fake_hub: FakeHub, name: Hub, path: str) -> None:
    fake_hub.files.update({"config.json": b"{}", path: b"evil"})
    with fetch.client() as http, pytest.raises(ModelError, match="unsafe path"):
        hub.named(name).files(http, "org/model")


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_an_answer_that_is_no_listing_is_one_sentence(fake_hub: FakeHub, name: Hub) -> None:
    fake_hub.status = 200  # a captive portal says 200 and some text
    with fetch.client() as http, pytest.raises(ModelError, match="did not answer with a list of files"):
        hub.named(name).files(http, "org/model")


@pytest.mark.parametrize("name", ["huggingface", "modelscope"])
def test_an_unknown_repository_is_named(fake_hub: FakeHub, name: Hub) -> None:
    fake_hub.status = 404
    with (
        fetch.client() as http,
        pytest.raises(ModelError, match="Can't fetch the list of files of org/model: "),
    ):
        hub.named(name).files(http, "org/model")


def test_endpoints_follow_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.huggingface_endpoint() == "https://huggingface.co"
    assert config.modelscope_endpoint() == "https://www.modelscope.cn"
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    monkeypatch.setenv("MODELSCOPE_DOMAIN", "www.modelscope.ai")
    assert hub.HuggingFace().file("o/m", "f").url == "https://mirror.example/o/m/resolve/main/f"
    assert config.modelscope_endpoint() == "https://www.modelscope.ai"
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "http://127.0.0.1:1")
    assert config.modelscope_endpoint() == "http://127.0.0.1:1"
