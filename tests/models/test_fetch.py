from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fetch, hub
from fakes.hub import FakeHub, sha256
from fakes.screen import Screen

DATA = bytes(range(256)) * 4096


def pull(target: Path, screen: Screen, *, expect: str | None = None, hub_name: str = "huggingface") -> str:
    remote = hub.named(hub_name).file("org/model", "m.bin", None, expect)  # type: ignore[arg-type]
    with fetch.client() as http:
        return fetch.download(http, remote, target, screen)


def files(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir())


@pytest.fixture
def target(tmp_path: Path, fake_hub: FakeHub) -> Path:
    fake_hub.files["m.bin"] = DATA
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "m.bin"


def test_follows_the_redirect_and_checks_the_hash_it_names(
    target: Path, fake_hub: FakeHub, screen: Screen
) -> None:
    assert pull(target, screen) == sha256(DATA)
    assert target.read_bytes() == DATA
    assert files(target.parent) == ["m.bin"]
    assert "m.bin: 100% (1.0 MB of 1.0 MB)" in screen.text


def test_a_token_goes_to_the_hub(
    target: Path, fake_hub: FakeHub, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    pull(target, screen)
    assert fake_hub.requests[0][1]["authorization"] == "Bearer hf_x"


def test_a_cut_connection_is_continued_where_it_stopped(
    target: Path, fake_hub: FakeHub, screen: Screen
) -> None:
    fake_hub.cuts, fake_hub.cut_after = 3, 300_000
    pull(target, screen)
    assert target.read_bytes() == DATA
    assert fake_hub.ranges_asked()[::2] == ["bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_server_without_ranges_is_asked_for_everything_again(
    target: Path, fake_hub: FakeHub, screen: Screen
) -> None:
    fake_hub.cuts, fake_hub.cut_after, fake_hub.ranges = 1, 300_000, False
    pull(target, screen)
    assert target.read_bytes() == DATA


def test_the_part_of_a_killed_run_is_continued(target: Path, fake_hub: FakeHub, screen: Screen) -> None:
    target.with_name("m.bin.part").write_bytes(DATA[:1000])
    pull(target, screen, expect=sha256(DATA))
    assert target.read_bytes() == DATA
    assert set(fake_hub.ranges_asked()) == {"bytes=1000-"}
    assert files(target.parent) == ["m.bin"]


def test_the_part_of_another_version_is_not_mistaken(target: Path, fake_hub: FakeHub, screen: Screen) -> None:
    for stale in (b"older", b"longer" * len(DATA)):
        target.with_name("m.bin.part").write_bytes(stale)
        with pytest.raises(
            ModelError, match=r"m.bin from Hugging Face is not the expected file .* try again"
        ):
            pull(target, screen, expect=sha256(DATA))
        assert files(target.parent) == []
    pull(target, screen, expect=sha256(DATA))  # "try again" is true
    assert target.read_bytes() == DATA


def test_a_connection_that_always_breaks_leaves_nothing(
    target: Path, fake_hub: FakeHub, screen: Screen
) -> None:
    fake_hub.cuts, fake_hub.cut_after, fake_hub.ranges = 99, 1000, False
    with pytest.raises(ModelError, match=r"Can't fetch m.bin from Hugging Face: .*; check the network"):
        pull(target, screen)
    assert files(target.parent) == []


def test_a_large_part_is_kept_for_the_next_run(
    target: Path, fake_hub: FakeHub, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "WORTH_CONTINUING", 1000)
    fake_hub.cuts, fake_hub.cut_after, fake_hub.ranges = 99, 1000, False
    with pytest.raises(ModelError):
        pull(target, screen, expect=sha256(DATA))
    assert files(target.parent) == ["m.bin.part"]
    fake_hub.cuts, fake_hub.ranges = 0, True
    pull(target, screen, expect=sha256(DATA))
    assert files(target.parent) == ["m.bin"]


@pytest.mark.parametrize("hub_name", ["huggingface", "modelscope"])
def test_wrong_content_is_deleted(target: Path, fake_hub: FakeHub, screen: Screen, hub_name: str) -> None:
    fake_hub.served["m.bin"] = DATA[::-1]
    with pytest.raises(ModelError, match="its SHA-256 differs"):
        pull(target, screen, expect=sha256(DATA), hub_name=hub_name)
    assert files(target.parent) == []


@pytest.mark.parametrize(
    ("status", "sentence"),
    [(401, "set HF_TOKEN"), (404, "does not have it"), (503, "answered HTTP 503; try again later, or check")],
)
def test_refusals_say_what_to_do(
    target: Path, fake_hub: FakeHub, screen: Screen, status: int, sentence: str
) -> None:
    fake_hub.status = status
    with pytest.raises(ModelError, match=sentence):
        pull(target, screen)
    assert files(target.parent) == []


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "no-scheme", "http://[bad"])
def test_no_network_is_one_sentence(
    target: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    with pytest.raises(
        ModelError, match=r"Can't fetch m.bin from Hugging Face: [^;]+; .*HF_ENDPOINT to a mirror"
    ):
        pull(target, screen)
    assert files(target.parent) == []


def test_a_proxy_is_used(
    target: Path, fake_hub: FakeHub, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", fake_hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://hub.invalid")
    pull(target, screen)
    assert fake_hub.requests[0][0].startswith("http://hub.invalid/")


def test_a_nonsense_proxy_is_one_sentence(
    target: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://x")
    with pytest.raises(ModelError, match="proxy"):
        pull(target, screen)


SCRIPT = """
import resource, sys
from pathlib import Path
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fetch, hub
from deepseek_api_compat.models.progress import Progress
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
try:
    with fetch.client() as http:
        remote = hub.HuggingFace().file("org/model", "m.bin")
        fetch.download(http, remote, Path(sys.argv[1]), Progress())
except ModelError as error:
    sys.exit(str(error))
except KeyboardInterrupt:
    sys.exit(130)
"""


def run(target: Path, limit: int = 0) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT.format(limit=limit))
    return subprocess.Popen([sys.executable, "-c", script, str(target)], stderr=subprocess.PIPE, text=True)


def test_a_disk_that_takes_no_more_leaves_nothing(target: Path) -> None:
    with run(target, limit=400_000) as process:
        _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.search(r"Can't write to the model cache .*: File too large; free space there", said)
    assert files(target.parent) == []


def test_ctrl_c_leaves_nothing(target: Path, fake_hub: FakeHub) -> None:
    fake_hub.hang, fake_hub.cut_after = True, 300_000
    with run(target) as process:
        assert fake_hub.hanging.wait(10)
        os.kill(process.pid, signal.SIGINT)
        process.communicate(timeout=10)
    assert process.returncode == 130
    assert files(target.parent) == []


def test_too_little_space_is_said_before_the_download(
    target: Path, fake_hub: FakeHub, screen: Screen
) -> None:
    from deepseek_api_compat.models import shelf

    with pytest.raises(
        ModelError, match=r"Not enough disk space for m: it needs 1000000000 GB and .* has .* free"
    ):
        shelf.need_space(target.parent, 10**18, "m")
