"""`deepseek-api plan` and `serve --plan`, as they are typed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from deepseek_api_compat.cli import main

BIN = Path(sys.executable).parent
TWO_NODES = ("--model", "deepseek-v3", "--gpu", "h100-80", "--nodes", "2")


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    assert main(["plan", *words]) == code
    output = capsys.readouterr()
    return output.err if code else output.out


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--model", "deepseek-v3", "--gpu", "h200")
    assert text.startswith("deepseek-v3 on 8 x H200 141 GB: fits.\n")
    assert "671.0 billion, 36.6 billion for each token" in text
    assert "70,272 bytes a token" in text
    assert "vllm serve deepseek-ai/DeepSeek-V3 --tensor-parallel-size 8" in text
    assert "Computed, not measured" in text


def test_the_table_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    lines = said(capsys, "--model", "deepseek-v3", "--gpu", "h200").splitlines()
    start, end = lines.index("  GB of the fullest GPU"), next(i for i, x in enumerate(lines) if "in all" in x)
    numbers = [float(line.split()[-1]) for line in lines[start + 1 : end + 1]]
    assert sum(numbers[:-1]) == pytest.approx(numbers[-1], abs=0.005 * len(numbers))


def test_ram_has_a_table_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--model", "deepseek-v3", "--gpu", "rtx4090", "--count", "1", "--ram", "512")
    assert text.index("GB of all GPUs") < text.index("GB of RAM") < text.index("routed experts")
    assert "--cpu-moe" in text


def test_no_is_an_exit_code_and_one_sentence_with_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, "--model", "deepseek-v3", "--gpu", "h100-80", code=1)
    assert "it needs at least" in text
    assert "What would fit: 2 nodes of 8 x H100 80 GB" in text
    assert "no GPU 'abacus'" in said(capsys, "--model", "deepseek-v3", "--gpu", "abacus", code=1)
    assert "catalogue" in said(capsys, "--model", "no-such-model", "--gpu", "h200", code=1)


def test_numbers_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--model", "deepseek-v3", "--gpu", "h200", "--count", "0"])
    assert "must be 1 or more" in capsys.readouterr().err


def test_toml_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(capsys, *TWO_NODES, "--toml").startswith('[[models]]\nname = "deepseek-v3"\n')
    found = json.loads(said(capsys, *TWO_NODES, "--json"))
    assert len(found["nodes"]) == 2
    assert found["plan"]["layout"]["pipeline"] == 2


def serve(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`serve` where `vllm` is a program that tells its arguments."""
    program = folder / "vllm"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)
    return subprocess.run(
        [BIN / "deepseek-api", "serve", "--port", "0", "--data-dir", folder / "data", *words],
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_worker_node_becomes_the_engine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = said(capsys, *TWO_NODES, "--head", "192.0.2.1", "--json")
    (tmp_path / "plan.json").write_text(text)
    done = serve(tmp_path, "--plan", str(tmp_path / "plan.json"), "--node-rank", "1")
    assert done.returncode == 0, done.stderr
    shown, ran = done.stdout.splitlines()
    assert shown.startswith("Node 1 of the plan runs: vllm serve ")
    assert json.loads(ran) == json.loads(text)["nodes"][1][1:]
    assert not (tmp_path / "data").exists()


def test_plans_that_serve_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(said(capsys, *TWO_NODES, "--json"))
    assert "lacks the first node's address" in serve(tmp_path, "--plan", str(plan)).stderr
    assert "lacks the first node's address" in serve(tmp_path, "--plan", str(plan), "--node-rank", "1").stderr
    assert "needs a --plan" in serve(tmp_path, "--node-rank", "1").stderr
    assert "Give either --plan" in serve(tmp_path, "--plan", str(plan), "--model-path", "x.gguf").stderr
