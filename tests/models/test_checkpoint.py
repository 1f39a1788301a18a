"""What the files of a model say of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue, checkpoint, prepared
from deepseek_api_compat.protocol.deepseek.segments import ASSISTANT, BOS, EOS, THINK, THINK_END, USER
from fakes.tiny_gguf import write_deepseek, write_gguf

TEMPLATES = Path(__file__).parents[1] / "golden" / "templates"
R1 = (TEMPLATES / "r1.jinja").read_text(encoding="utf-8")
V31 = (TEMPLATES / "v3.1.jinja").read_text(encoding="utf-8")
TURNS = (BOS, EOS, USER, ASSISTANT)


def tiny(path: Path, weights: np.ndarray, **fields: Any) -> checkpoint.Checkpoint:
    return checkpoint.read(write_gguf(path / "x.gguf", weights, GGMLQuantizationType.Q4_0, **fields))


def test_a_model_distilled_from_r1(tmp_path: Path, weights: np.ndarray) -> None:
    found = tiny(tmp_path, weights, chat_template=R1, control=TURNS, user_defined=(THINK, THINK_END))
    assert found.format == "r1"
    assert (found.architecture, found.context, found.chat_template) == ("llama", 128, R1)
    assert found.controls == {BOS: 3, EOS: 4, USER: 5, ASSISTANT: 6, THINK: 7, THINK_END: 8}
    assert found.eager == [THINK, THINK_END]


def test_the_same_template_without_the_tokens(tmp_path: Path, weights: np.ndarray) -> None:
    found = tiny(tmp_path, weights, chat_template=R1, control=["<s>"])
    assert found.format == "template"
    assert found.why.endswith(
        f"but the vocabulary has no {BOS}, {EOS}, {USER}, {ASSISTANT}, {THINK}, {THINK_END}"
    )


def test_user_defined_tokens_that_stand_for_text_are_no_control_tokens(
    tmp_path: Path, weights: np.ndarray
) -> None:
    marks = ["<tool_call>", "</tool_call>", "[TOOL]", "｜DSML｜", "<|end|>", "<a_b>"]
    texts = ["\n\n", "    ", "<table>", "</h1>", "<br/>", "<B>", "<>", "<1>", "word", "<"]
    found = tiny(tmp_path, weights, control=["<s>", ""], user_defined=[*marks, *texts])
    assert set(found.controls) == {"<s>", *marks}
    assert found.eager == marks


def test_sentencepiece_may_merge_pieces_into_any_token(tmp_path: Path, weights: np.ndarray) -> None:
    found = tiny(tmp_path, weights, tokenizer="llama", control=["<s>", "</s>"], user_defined=["<x>"])
    assert found.eager == ["<s>", "</s>", "<x>"]


def test_deepseeks_vocabulary(tmp_path: Path, users_cache: Path) -> None:
    tokenizer = prepared.pull(catalogue.find("deepseek-v3-tokenizer"))
    found = checkpoint.read(write_deepseek(tmp_path / "deepseek.gguf", tokenizer, V31))
    assert found.format == "v3.1"
    added = json.loads(tokenizer.read_bytes())["added_tokens"]
    assert found.controls == {token["content"]: token["id"] for token in added}
    assert len(found.controls) == 818
    assert found.eager == [THINK, THINK_END]


# A folder as Hugging Face lays it out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    added = [{"id": at, "content": text, "special": "｜" in text} for at, text in enumerate(TURNS)]
    added += [{"id": 8, "content": THINK}, {"id": 9, "content": THINK_END}, {"id": 10, "content": "\n\n"}]
    write(tmp_path, "config.json", {"model_type": "deepseek_v3", "max_position_embeddings": 163840})
    write(tmp_path, "tokenizer.json", {"version": "1.0", "added_tokens": added})
    write(tmp_path, "tokenizer_config.json", {"chat_template": R1, "model_max_length": 1e30})
    return tmp_path


def write(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_a_folder(folder: Path) -> None:
    found = checkpoint.read(folder)
    assert (found.architecture, found.context, found.format) == ("deepseek_v3", 163840, "r1")
    assert found.controls == {BOS: 0, EOS: 1, USER: 2, ASSISTANT: 3, THINK: 8, THINK_END: 9}


def test_the_template_in_a_file_of_its_own_counts_more(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(V31, encoding="utf-8")
    assert checkpoint.read(folder).format == "v3.1"


def test_several_templates(folder: Path) -> None:
    named = [{"name": "tool_use", "template": ""}, {"name": "default", "template": V31}]
    write(folder, "tokenizer_config.json", {"chat_template": named})
    assert checkpoint.read(folder).format == "v3.1"
    write(folder, "tokenizer_config.json", {"chat_template": named[:1]})
    assert checkpoint.read(folder).chat_template is None


@pytest.mark.parametrize(("missing", "format"), [("tokenizer.json", "r1"), ("tokenizer_config.json", "v3")])
def test_a_folder_without(folder: Path, missing: str, format: str) -> None:
    (folder / missing).unlink()
    assert checkpoint.read(folder).format == format


def test_only_architectures(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    write(folder, "config.json", {"architectures": ["DeepseekV32ForCausalLM"]})
    found = checkpoint.read(folder)
    assert (found.architecture, found.context, found.format) == ("DeepseekV32ForCausalLM", None, "v3.2")


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(ModelError, match=r"Can't make sense of .*tokenizer\.json: "):
        checkpoint.read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"has no config\.json; it is not the folder of a model"):
        checkpoint.read(folder)
    (folder / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"Can't read .*config\.json: Is a directory"):
        checkpoint.read(folder)
