"""Models whose prompts can't be written are not started, and say why."""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from deepseek_api_compat.cli import serve
from deepseek_api_compat.config import EngineSettings, ModelSettings, ServerSettings, Settings
from deepseek_api_compat.engines.lifeline import Lifeline
from deepseek_api_compat.engines.readiness import ready
from deepseek_api_compat.errors import ConfigError
from deepseek_api_compat.gateway.replicas import _ask, asked_what_it_is, replicas_of
from deepseek_api_compat.protocol.deepseek import detect
from fakes.tiny_gguf import write_gguf

TEMPLATES = Path(__file__).parents[1] / "golden" / "templates"
MISSING = "pip install 'deepseek-api-compat[formats]'"


@pytest.fixture
def lifeline() -> Iterator[Lifeline]:
    lifeline = Lifeline()
    yield lifeline
    lifeline.close()


@pytest.fixture
def no_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "find_spec", lambda name: None)


def model(path: Path, format: str) -> Path:
    """A file of that format; it has all tokens that the format needs, and can't run."""
    template = (TEMPLATES / f"{format}.jinja").read_text(encoding="utf-8")
    weights = np.ones((4, 64), np.float32)
    tokens = detect.REQUIRED.get(format, ("<|im_end|>",))
    return write_gguf(
        path / "m.gguf", weights, GGMLQuantizationType.Q4_0, chat_template=template, control=tokens
    )


async def problem(path: Path, format: str, data_dir: Path, lifeline: Lifeline) -> str:
    """What the replica of that model, with that configured format, says once it has failed."""
    engine = EngineSettings(kind="llamacpp", path=str(path))
    models = [ModelSettings(name="m", format=format, engines=[engine])]  # type: ignore[arg-type]
    settings = Settings(server=ServerSettings(data_dir=str(data_dir)), models=models)
    failed = asyncio.Event()
    (replica,) = replicas_of(settings, lifeline, lambda one: one.state == "failed" and failed.set())
    await replica.start()
    await asyncio.wait_for(failed.wait(), 60)
    told = replica.describe().detail
    await replica.stop()
    return told


@pytest.mark.usefixtures("no_recipe")
async def test_a_detected_format_needs_its_package(tmp_path: Path, lifeline: Lifeline) -> None:
    assert MISSING in await problem(model(tmp_path, "v4"), "auto", tmp_path, lifeline)


async def test_a_configured_format_needs_its_tokens(tmp_path: Path, lifeline: Lifeline) -> None:
    told = await problem(model(tmp_path, "chatml"), "v3.1", tmp_path, lifeline)
    assert told.startswith("The model has no control token <｜begin▁of▁sentence｜>, ")
    assert "which the format v3.1 needs; set models.format to another one." in told


async def test_a_file_that_is_gone(tmp_path: Path, lifeline: Lifeline) -> None:
    told = await problem(tmp_path / "none.gguf", "auto", tmp_path, lifeline)
    assert told == f"Can't read the model file {tmp_path}/none.gguf: No such file or directory."


@pytest.mark.usefixtures("no_recipe")
async def test_another_format_in_the_configuration_is_a_way_out(tmp_path: Path, lifeline: Lifeline) -> None:
    told = await problem(model(tmp_path, "v4"), "template", tmp_path, lifeline)
    assert "The process exited" in told  # it was started; only these weights are of no use


@pytest.mark.usefixtures("no_recipe")
def test_serve_refuses_a_configured_format_without_its_package(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        '[[models]]\nname = "m"\nformat = "v4.1"\n[[models.engines]]\nkind = "llamacpp"\npath = "m.gguf"\n'
    )
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser, host=None)
    arguments = ["--config", str(config), "--data-dir", str(tmp_path / "data"), "--port", "0"]
    with pytest.raises(ConfigError, match=r"models\.m: The format v4\.1 needs the package") as caught:
        serve.run(parser.parse_args(arguments))
    assert MISSING in str(caught.value)
    assert not (tmp_path / "data").exists()


async def test_an_engine_that_is_not_there_gives_no_answer(tmp_path: Path, lifeline: Lifeline) -> None:
    engine = EngineSettings(kind="llamacpp", path=str(model(tmp_path, "v3")))
    models = [ModelSettings(name="m", engines=[engine])]
    settings = Settings(server=ServerSettings(data_dir=str(tmp_path)), models=models)
    (replica,) = replicas_of(settings, lifeline, lambda one: None)
    for question in (asked_what_it_is, ready):
        assert "Can't reach the engine" in await _ask(replica, engine, question, 5.0)
