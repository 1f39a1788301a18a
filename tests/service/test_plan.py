"""`serve --plan` with a plan for this machine's CPU."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from fakes.configs import TINY, chat
from fakes.service import BIN, Service

# SmolLM2-135M-Instruct's config.json, as far as plans read it.
SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


@pytest.mark.embedded
def test_a_planned_model_answers(tmp_path: Path) -> None:
    folder = tmp_path / "planned"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SMOLLM2))
    words = ["--model", folder, "--gpu", "none", "--ram", "16", "--path", TINY]
    words += ["--context", "512", "--concurrency", "2", "--json"]
    argv = [BIN / "deepseek-api", "plan", *words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    (tmp_path / "plan.json").write_text(done.stdout)
    service = Service(tmp_path / "data", "--plan", str(tmp_path / "plan.json"))
    try:
        [state] = service.engines()
        assert (state["model"], state["kind"], state["state"]) == ("planned", "llamacpp", "ready")
        assert {"--slots=2", "--context=512"} <= set(state["argv"])
        with service.client() as client:
            answer = client.post("/v1/chat/completions", json=chat("planned", max_tokens=3)).json()
        assert answer["usage"]["completion_tokens"] == 3
    finally:
        service.kill()
