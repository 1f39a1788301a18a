from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import tiny_v3
from deepseek_api_compat.models.safetensors_files import INDEX, Weights
from deepseek_api_compat.models.v3_config import read_config
from fakes.small_v3 import write_small


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_the_seed_decides(tmp_path: Path) -> None:
    first, again = write_small(tmp_path / "first"), write_small(tmp_path / "again")
    assert digests(first) == digests(again)
    other = tmp_path / "other"
    other.mkdir()
    tiny_v3.write_checkpoint(other, first / "tokenizer.json", seed=1, changes=json_of(first / "config.json"))
    name = "model.layers.1.mlp.gate.weight"
    assert (Weights(other).read(name) != Weights(first).read(name)).mean() > 0.9


def json_of(path: Path) -> dict[str, object]:
    value: dict[str, object] = json.loads(path.read_text())
    return value


def test_weights_stay_what_they_are(tmp_path: Path) -> None:
    """Recorded answers of engines hold for them: another numpy must not give others."""
    weights = Weights(write_small(tmp_path / "small"))
    expected = {
        "model.embed_tokens.weight": [0.109375, 0.234375, -0.375],
        "model.layers.1.self_attn.q_a_proj.weight": [-0.09765625, -0.14453125, 0.013671875],
        "model.layers.2.mlp.gate.e_score_correction_bias": [0.2109375, 0.078125, 0.20703125],
        "model.norm.weight": [0.9140625, 0.9453125, 1.1171875],
    }
    assert {name: weights.read(name).ravel()[:3].tolist() for name in expected} == expected


def test_names_are_the_real_ones(tmp_path: Path) -> None:
    """As in the index of DeepSeek-V3, whose last layer (61 there, 3 here) predicts one token more."""
    folder = write_small(tmp_path / "small", quantised=True)
    names = set(json.loads((folder / INDEX).read_text())["weight_map"])
    for name in (
        "model.embed_tokens.weight",
        "model.layers.0.mlp.down_proj.weight_scale_inv",
        "model.layers.1.mlp.experts.15.gate_proj.weight",
        "model.layers.1.mlp.gate.e_score_correction_bias",
        "model.layers.1.mlp.shared_experts.up_proj.weight_scale_inv",
        "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv",
        "model.layers.3.eh_proj.weight",
        "model.layers.3.embed_tokens.weight",
        "model.layers.3.enorm.weight",
        "model.layers.3.hnorm.weight",
        "model.layers.3.mlp.experts.0.up_proj.weight",
        "model.layers.3.shared_head.head.weight",
        "model.layers.3.shared_head.norm.weight",
        "lm_head.weight",
    ):
        assert name in names
    for name in ("model.layers.3.eh_proj", "lm_head", "model.layers.1.mlp.gate", "model.norm"):
        assert f"{name}.weight_scale_inv" not in names


def test_the_prediction_layer_shares_embedding_and_head(tmp_path: Path) -> None:
    weights = Weights(write_small(tmp_path / "small"))
    for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert (weights.read(f"model.layers.3.{copy}.weight") == weights.read(f"{original}.weight")).all()


def test_weights_survive_half_precision(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "small")
    weights = Weights(folder)
    for name in read_config(folder).tensors():
        values = weights.read(name)
        assert (values.astype(np.float16).astype(np.float32) == values).all(), name
        assert not (values.view(np.uint32) & 0xFFFF).any(), name


def test_only_a_new_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(ModelError, match="is not empty; name a new folder"):
        tiny_v3.build(tmp_path, tmp_path / "mine")
    with pytest.raises(ModelError, match=r"Can't write to .*mine: File exists"):
        tiny_v3.build(tmp_path / "mine", tmp_path / "mine")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No such file"):
        tiny_v3.build(tmp_path / "out", tmp_path / "no tokenizer")
    assert not (tmp_path / "out.part").exists()
    assert not any((tmp_path / "out").iterdir())


def test_no_record(tmp_path: Path) -> None:
    assert tiny_v3.recorded(tmp_path) == []
    (tmp_path / tiny_v3.GREEDY).write_text("{}")
    with pytest.raises(ModelError, match=r"Can't make sense of .*greedy.json"):
        tiny_v3.recorded(tmp_path)
