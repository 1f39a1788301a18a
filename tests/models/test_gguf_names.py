from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import gguf
import msgspec
import pytest

from deepseek_api_compat.models import gguf_names
from deepseek_api_compat.models.v3_config import V3Config, Yarn, read_config
from fakes.small_v3 import write_small


def real() -> V3Config:
    """DeepSeek-V3's own."""
    return V3Config(
        hidden_size=7168,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=129280,
        max_position_embeddings=163840,
        rms_norm_eps=1e-6,
        rope_theta=10000,
        num_nextn_predict_layers=1,
        rope_scaling=Yarn(40, 4096, mscale_all_dim=1.0),
    )


def test_the_real_model_has_671_billion_weights() -> None:
    shapes = real().tensors()
    total = sum(math.prod(shape) for shape in shapes.values())
    prediction = sum(math.prod(s) for name, s in shapes.items() if name.startswith("model.layers.61."))
    assert (total - prediction) / 1e9 == pytest.approx(671.0, abs=0.05)
    assert prediction / 1e9 == pytest.approx(
        13.5, abs=0.05
    )  # 11.6 of its own, embedding and head of 0.9 each


def test_every_weight_is_used_once_but_for_multi_token_prediction() -> None:
    config = real()
    used = [source for target in gguf_names.targets(config) for source in target.sources]
    shapes = config.tensors()
    assert set(shapes) - set(used) == {name for name in shapes if name.startswith("model.layers.61.")}
    twice = {name for name, times in Counter(used).items() if times > 1}
    assert twice == {f"model.layers.{layer}.self_attn.kv_b_proj.weight" for layer in range(61)}


def test_no_weight_is_lost() -> None:
    config = real()
    shapes = config.tensors()
    sizes = {target.name: math.prod(target.shape) for target in gguf_names.targets(config)}
    kept = sum(math.prod(shape) for name, shape in shapes.items() if not name.startswith("model.layers.61."))
    assert sum(sizes.values()) == kept


def test_names_are_those_that_the_gguf_package_knows(tmp_path: Path) -> None:
    config = read_config(write_small(tmp_path / "small"))
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2]}
    names = {target.name for target in gguf_names.targets(config)}
    patterns = {name.rsplit(".", 1)[0] for name in names}
    assert patterns <= {pattern.format(bid=layer) for pattern in known for layer in range(3)}
    assert {name.rsplit(".", 1)[1] for name in names} == {"weight", "bias"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 61),
        ("leading_dense_block_count", 3),
        ("attention.key_length", 576),
        ("attention.value_length", 512),
        ("attention.key_length_mla", 192),
        ("attention.value_length_mla", 128),
        ("attention.head_count_kv", 1),
        ("rope.dimension_count", 64),
        ("rope.scaling.factor", 40.0),
        ("rope.scaling.original_context_length", 4096),
        ("rope.scaling.yarn_log_multiplier", 0.1),
        ("expert_gating_func", gguf.ExpertGatingFuncType.SIGMOID),
        ("expert_weights_scale", 2.5),
    ],
)
def test_settings_of_the_real_model(key: str, value: float) -> None:
    found = gguf_names.settings(real())[f"deepseek2.{key}"]
    assert (found, type(found)) == (value, float if isinstance(value, float) else int)


def test_without_yarn_no_scaling() -> None:
    config = msgspec.structs.replace(real(), rope_scaling=None)
    assert not [key for key in gguf_names.settings(config) if "scaling" in key]
