"""A cache of its own for every test, a fake of both hubs, and tiny models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from deepseek_api_compat import config
from fakes.hub import FakeHub
from fakes.screen import Screen
from fakes.tiny_gguf import write_gguf

REAL_CACHE = config.cache_dir()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for variable in ("HF_ENDPOINT", "HF_TOKEN", "MODELSCOPE_ENDPOINT", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def screen() -> Screen:
    return Screen()


@pytest.fixture
def weights() -> np.ndarray:
    return np.random.default_rng(7).normal(size=(4, 64)).astype(np.float32)


@pytest.fixture
def tiny_gguf(tmp_path: Path, weights: np.ndarray) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", weights, gguf.GGMLQuantizationType.Q4_1)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    hub = FakeHub()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", hub.url)
    yield hub
    hub.close()


@pytest.fixture
def users_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of whoever runs the tests, for what takes the real model."""
    monkeypatch.setenv("DEEPSEEK_CACHE_DIR", str(REAL_CACHE))
    return REAL_CACHE
