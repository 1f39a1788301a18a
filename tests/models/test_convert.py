from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import checkpoint, convert
from deepseek_api_compat.models.deepseek_v3 import DeepSeekV3
from deepseek_api_compat.models.gguf import inspect, vocabulary
from deepseek_api_compat.models.safetensors_files import INDEX, Weights
from fakes.screen import Screen
from fakes.small_v3 import SIZES, TOKENS, WORDS, write_small

Q = gguf.GGMLQuantizationType


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small(tmp_path_factory.mktemp("v3") / "small")


def tensors(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def values(tensor: Any) -> np.ndarray:
    shape = tuple(reversed(tensor.shape.tolist()))
    weights: np.ndarray = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
    return weights


def test_every_weight_is_where_llama_cpp_looks_for_it(folder: Path, tmp_path: Path, screen: Screen) -> None:
    convert.to_gguf(folder, tmp_path / "out.gguf", "f32", screen)
    found, weights = tensors(tmp_path / "out.gguf"), DeepSeekV3(folder).weights
    plain = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.2.attn_q_a.weight": "model.layers.2.self_attn.q_a_proj.weight",
        "blk.2.attn_kv_a_mqa.weight": "model.layers.2.self_attn.kv_a_proj_with_mqa.weight",
        "blk.2.attn_norm.weight": "model.layers.2.input_layernorm.weight",
        "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        "blk.2.ffn_up_shexp.weight": "model.layers.2.mlp.shared_experts.up_proj.weight",
        "blk.2.exp_probs_b.bias": "model.layers.2.mlp.gate.e_score_correction_bias",
    }
    for ours, theirs in plain.items():
        assert values(found[ours]).tolist() == weights[theirs].tolist(), ours
    experts = values(found["blk.1.ffn_gate_exps.weight"])
    assert experts.shape == (16, SIZES["moe_intermediate_size"], SIZES["hidden_size"])
    for expert, weight in enumerate(experts):
        assert weight.tolist() == weights[f"model.layers.1.mlp.experts.{expert}.gate_proj.weight"].tolist()
    assert not [name for name in found if name.startswith("blk.3.")]  # multi-token prediction
    assert "Converting: 100%" in screen.text


def test_the_latent_vector_gives_the_same_keys_and_values(folder: Path, tmp_path: Path) -> None:
    convert.to_gguf(folder, tmp_path / "out.gguf", "f32")
    found, model = tensors(tmp_path / "out.gguf"), DeepSeekV3(folder)
    latent = np.linspace(-1, 1, SIZES["kv_lora_rank"], dtype=np.float32)
    expanded = (model.weights["model.layers.1.self_attn.kv_b_proj.weight"] @ latent).reshape(3, -1)
    keys = latent @ values(found["blk.1.attn_k_b.weight"])
    together = np.concatenate([keys, values(found["blk.1.attn_v_b.weight"]) @ latent], axis=1)
    assert np.abs(together - expanded).max() < 1e-5


def test_metadata(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    convert.to_gguf(folder, path, "q8_0")
    header = inspect(path)  # also: the file is as long as its table of tensors says
    assert (header.architecture, header.name, header.file_type) == ("deepseek2", "small", 7)
    assert header.context_length == 163840
    fields = gguf.GGUFReader(path).fields
    assert fields["deepseek2.attention.q_lora_rank"].contents() == SIZES["q_lora_rank"]
    assert fields["deepseek2.rope.scaling.yarn_log_multiplier"].contents() == pytest.approx(0.1)
    assert fields["deepseek2.expert_weights_norm"].contents() is True
    assert fields["general.quantization_version"].contents() == 2


def test_vocabulary(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.gguf"
    convert.to_gguf(folder, path, "f32")
    fields = gguf.GGUFReader(path).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == TOKENS
    assert tokens[3:6] == ["a", "b", "ab"]
    assert tokens[-1] == f"[PAD{TOKENS - 1}]"
    assert fields["tokenizer.ggml.merges"].contents() == ["a b"]
    assert fields["tokenizer.ggml.pre"].contents() == "deepseek-v3"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    types = fields["tokenizer.ggml.token_type"].contents()
    assert [types[id] for id in (0, 3, WORDS + 3, TOKENS - 1)] == [3, 1, 4, 5]
    found = vocabulary(path)
    assert found.fim == (WORDS + 1, WORDS, WORDS + 2)
    assert found.user_defined == {"<think>": WORDS + 3}
    template = fields["tokenizer.chat_template"].contents()
    assert template == checkpoint.read(folder).chat_template


@pytest.mark.parametrize(
    ("type", "kind", "head", "error"),
    [
        ("f16", Q.F16, Q.F16, 0.0),
        ("bf16", Q.BF16, Q.BF16, 0.0),
        ("q8_0", Q.Q8_0, Q.Q8_0, 1 / 127 / 2),
        ("q4_0", Q.Q4_0, Q.Q8_0, 1 / 8),
    ],
)
def test_types(folder: Path, tmp_path: Path, type: convert.Type, kind: Q, head: Q, error: float) -> None:
    """Matrices have the type asked for; norms, routers, biases stay exact. error: of the largest weight."""
    convert.to_gguf(folder, tmp_path / "out.gguf", type)
    found = tensors(tmp_path / "out.gguf")
    assert found["output.weight"].tensor_type == head
    assert found["blk.1.ffn_up_exps.weight"].tensor_type == kind
    for exact in ("blk.1.attn_q_a_norm.weight", "blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias"):
        assert found[exact].tensor_type == Q.F32
    original = Weights(folder).read("model.layers.1.self_attn.o_proj.weight")
    difference = np.abs(values(found["blk.1.attn_output.weight"]) - original).max()
    assert difference <= error * np.abs(original).max() * 1.01
    assert (difference > 0) == (error > 0)


def test_rows_that_blocks_do_not_divide_become_f16(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "odd", q_lora_rank=80)
    convert.to_gguf(folder, tmp_path / "out.gguf", "q8_0")
    found = tensors(tmp_path / "out.gguf")
    assert found["blk.0.attn_q_b.weight"].tensor_type == Q.F16
    assert found["blk.0.attn_q_a.weight"].tensor_type == Q.Q8_0
    inspect(tmp_path / "out.gguf")


def test_fp8_is_dequantised(tmp_path: Path) -> None:
    folder = write_small(tmp_path / "fp8", quantised=True)
    convert.to_gguf(folder, tmp_path / "out.gguf", "f32")
    found, weights = tensors(tmp_path / "out.gguf"), DeepSeekV3(folder).weights
    for ours, theirs in {
        "blk.0.ffn_gate.weight": "mlp.gate_proj.weight",  # 160 rows: a whole block and part of one
        "blk.0.attn_output.weight": "self_attn.o_proj.weight",
    }.items():
        assert values(found[ours]).tolist() == weights[f"model.layers.0.{theirs}"].tolist()
    expanded = weights["model.layers.0.self_attn.kv_b_proj.weight"].reshape(3, 96, 64)  # heads cut blocks
    assert values(found["blk.0.attn_v_b.weight"]).tolist() == expanded[:, 32:].tolist()


def test_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint of 5 MB in shards of 600 kB, converted in pieces of 10,000 weights."""
    wide = {"moe_intermediate_size": 128, "hidden_size": 128}
    folder = write_small(tmp_path / "wide", quantised=True, shard_bytes=600_000, **wide)
    shards = list(folder.glob("*.safetensors"))
    total = sum(path.stat().st_size for path in shards)
    assert len(shards) > 5
    monkeypatch.setattr(convert, "_PIECE", 10_000)
    convert.to_gguf(folder, tmp_path / "first.gguf", "q8_0")  # what is loaded once is loaded
    tracemalloc.start()
    try:
        convert.to_gguf(folder, tmp_path / "out.gguf", "q8_0")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000 < total / 2
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()


def break_it(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / INDEX).read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    if how == "tensor":
        del index["weight_map"]["model.layers.1.mlp.experts.7.up_proj.weight"]
        for path in folder.glob("*.safetensors"):
            path.write_bytes(
                path.read_bytes().replace(b"layers.1.mlp.experts.7.up_", b"layers.1.mlp.experts.7.xx_")
            )
    elif how == "shape":
        config["v_head_dim"] = 32
    elif how == "kind":
        config["model_type"] = "qwen3"
    elif how == "cuts":
        tokenizer["pre_tokenizer"]["pretokenizers"].pop(0)
    elif how == "ids":
        tokenizer["added_tokens"][0]["id"] = TOKENS
    elif how == "tokenizer":
        tokenizer = {"model": {"type": "Unigram"}}
    for name, value in (("config.json", config), (INDEX, index), ("tokenizer.json", tokenizer)):
        (folder / name).write_text(json.dumps(value))
    if how == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    if how == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("tensor", r"The checkpoint lacks model\.layers\.1\.mlp\.experts\.7\.up_proj\.weight\."),
        ("shape", r"kv_b_proj\.weight is \(288, 64\) and should be \(192, 64\)|o_proj"),
        ("kind", "model_type is 'qwen3'"),
        ("cuts", "does not cut text as DeepSeek-V3's does"),
        ("ids", f"has the id {TOKENS}, and the model only {TOKENS} ids"),
        ("tokenizer", "Can't make sense of .*tokenizer.json"),
        ("no tokenizer", "Can't read .*tokenizer.json: No such file"),
        ("no config", "Can't read .*config.json: No such file"),
    ],
)
def test_what_is_not_this_layout_is_refused(tmp_path: Path, how: str, reason: str) -> None:
    folder = write_small(tmp_path / "small")
    break_it(folder, how)
    with pytest.raises(ModelError, match=reason):
        convert.to_gguf(folder, tmp_path / "out.gguf", "f32")
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_an_existing_file_stays(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_text("mine")
    with pytest.raises(ModelError, match="is already there"):
        convert.to_gguf(folder, tmp_path / "out.gguf", "f32")
    assert (tmp_path / "out.gguf").read_text() == "mine"


def test_a_disk_that_is_too_small(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 1000}))
    with pytest.raises(ModelError, match=r"The file needs 1.8 MB, and .* has 1.0 kB free"):
        convert.to_gguf(folder, tmp_path / "out.gguf", "f32")


def test_a_folder_that_is_not_there(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"Can't write .*out.gguf: No such file"):
        convert.to_gguf(folder, tmp_path / "nowhere" / "out.gguf", "f32")
