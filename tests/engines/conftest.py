"""Real engines, each started once for all tests: the default model, and one with DeepSeek's vocabulary."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from deepseek_api_compat.engines.base import Endpoint
from deepseek_api_compat.engines.llamacpp import LlamaCpp, with_files
from fakes.engines import served
from fakes.tiny_gguf import write_deepseek

TEMPLATES = Path(__file__).parents[1] / "golden" / "templates"


@pytest.fixture(scope="session")
def model_path() -> Path:
    """The prepared default model; fetched if this machine has none."""
    override = os.environ.get("DEEPSEEK_TEST_MODEL")
    if override:
        return Path(override)
    from deepseek_api_compat.models.prepared import default_model

    return default_model()


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """A path short enough for a Unix socket, whatever the name of the test."""
    directory = tempfile.mkdtemp(prefix="engine-")
    yield Path(directory) / "run" / "engine.sock"
    shutil.rmtree(directory)


@pytest.fixture(scope="session")
def engine_endpoint(model_path: Path) -> Iterator[Endpoint]:
    """A llama.cpp server with 8 slots of 1024 tokens."""
    with served(model_path, slots=8, context=1024) as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def v3_tokenizer_path() -> Path:
    from deepseek_api_compat.models import catalogue, prepared

    return prepared.pull(catalogue.find("deepseek-v3-tokenizer"))


@pytest.fixture(scope="session")
def deepseek_model(v3_tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with DeepSeek-V3's vocabulary and a template of V3.1's kind."""
    template = (TEMPLATES / "v3.1.jinja").read_text(encoding="utf-8")
    return write_deepseek(tmp_path_factory.mktemp("deepseek") / "tiny.gguf", v3_tokenizer_path, template)


@pytest.fixture(scope="session")
def deepseek_endpoint(deepseek_model: Path) -> Iterator[Endpoint]:
    """A llama.cpp server with that model, and 2 slots of 2048 tokens."""
    with served(deepseek_model, slots=2, context=2048) as endpoint:
        yield endpoint


@pytest.fixture
async def deepseek_engine(deepseek_model: Path, deepseek_endpoint: Endpoint) -> AsyncIterator[LlamaCpp]:
    """It, with what its files say of the model."""
    stranger = LlamaCpp(deepseek_endpoint)
    engine = LlamaCpp(deepseek_endpoint, known=with_files(await stranger.info(), deepseek_model))
    yield engine
    await stranger.close()
    await engine.close()


@pytest.fixture
async def engine(engine_endpoint: Endpoint) -> AsyncIterator[LlamaCpp]:
    engine = LlamaCpp(engine_endpoint)
    yield engine
    await engine.close()
