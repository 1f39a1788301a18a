"""A service for the programs of the seed texts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deepseek_api_compat.models.prepared import default_model
from fakes.service import Service

# The seeds' programs ask for long answers, or set no limit at all: a small context ends them in seconds.
CONFIG = """
[[models]]
name = "smollm2-135m-instruct"
aliases = ["deepseek-v3"]
temperature = 0.2
top_p = 0.9

  [[models.engines]]
  kind = "llamacpp"
  path = "{path}"
  batch_size = 2
  context = 256

# Where the seed's picture is fetched from here.
[media]
fetch_networks = ["127.0.0.1/32"]
"""


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The embedded model with a context of 256 tokens, also called deepseek-v3."""
    folder = tmp_path_factory.mktemp("seeds")
    config = folder / "config.toml"
    config.write_text(CONFIG.format(path=default_model()), encoding="utf-8")
    service = Service(folder / "data", "--config", str(config))
    yield service
    assert service.stop() == 0
