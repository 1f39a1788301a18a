"""One real service with the embedded model, for all clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.configs import PATIENT, TINY
from fakes.service import Service

# Clients name it as the documents do: `deepseek-v3`.
CONFIG = f"""{PATIENT.replace("max_queue = 6", "max_queue = 64")}
[[models]]
name = "{TINY}"
aliases = ["deepseek-v3", "deepseek-chat"]
temperature = 0.0
[[models.engines]]
kind = "llamacpp"
path = "{TINY}"
batch_size = 12
context = 2048
"""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Only who names this folder runs it, as `make migration` does: its clients are not ours to install."""
    return None if any("migration" in argument for argument in config.args) else True


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("migration")
    config = folder / "config.toml"
    config.write_text(CONFIG)
    service = Service(folder / "data", "--config", str(config))
    yield service
    assert service.stop() == 0
