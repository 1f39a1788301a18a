"""The programs of docs/migrate.md: the new side of each diff runs as it is written and says Paris."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fakes.service import Service

ROOT = Path(__file__).resolve().parent.parent.parent
NODE = Path(__file__).parent / "node"
PAGE = (ROOT / "docs" / "migrate.md").read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8000"
# Clients that the project's own environment doesn't have: a virtual environment for each, by the names below.
ENVIRONMENTS = Path(os.environ.get("MIGRATION_ENVIRONMENTS", ROOT / ".venv-migration"))
PYTHON = {
    "OpenAI Python": "openai",
    "OpenAI Python 0.28": "openai-0.28",
    "LangChain": "langchain-openai",
    "LangChain, DeepSeek": "langchain-deepseek",
    "LlamaIndex": "llama-index",
    "llm": "llm",
}
OURS = ("openai", "langchain-openai")
JAVASCRIPT = ["OpenAI Node", "Vercel AI SDK", "Vercel AI SDK, DeepSeek"]


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", PAGE, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def new_side(section: str) -> str:
    """What the section's diff leaves behind."""
    diff = re.search(r"^```diff\n(.*?)^```", sections()[section], re.M | re.S)
    assert diff, section
    kept = [line[1:] for line in diff[1].splitlines(keepends=True) if line[0] in "+ "]
    return "".join(kept)


def said(service: Service, argv: list[str], **more: str) -> str:
    environment = {**os.environ, "DEEPSEEK_API_KEY": str(service.key), **more}
    done = subprocess.run(argv, env=environment, cwd=NODE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_diff_has_a_runner() -> None:
    shown = {section for section, text in sections().items() if "```diff" in text}
    assert shown == {*PYTHON, *JAVASCRIPT, "curl"}


@pytest.mark.parametrize("section", PYTHON)
def test_python(service: Service, section: str, tmp_path: Path) -> None:
    name = PYTHON[section]
    python = sys.executable if name in OURS else str(ENVIRONMENTS / name / "bin" / "python")
    if not Path(python).exists():
        pytest.skip(f"{name} is not in {ENVIRONMENTS.name}")
    code = new_side(section).replace(WRITTEN, service.url)
    if section != "llm":
        assert "Paris" in said(service, [python, "-c", code])
        return
    models = re.search(r"^```yaml\n(.*?)^```", sections()[section], re.M | re.S)
    assert models
    (tmp_path / "extra-openai-models.yaml").write_text(models[1].replace(WRITTEN, service.url))
    path = f"{Path(python).parent}:{os.environ['PATH']}"
    assert "Paris" in said(service, ["bash", "-c", code], LLM_USER_PATH=str(tmp_path), PATH=path)


@pytest.mark.parametrize("section", JAVASCRIPT)
def test_javascript(service: Service, section: str) -> None:
    node = shutil.which("node")
    if node is None or not (NODE / "node_modules").is_dir():
        pytest.skip("needs node and `make migration-node`")
    code = new_side(section).replace(WRITTEN, service.url)
    assert "Paris" in said(service, [node, "--input-type=module", "-e", code])


def test_curl(service: Service) -> None:
    code = new_side("curl").replace(WRITTEN, service.url)
    assert "Paris" in said(service, ["bash", "-c", f"{code.rstrip()} --silent"])
