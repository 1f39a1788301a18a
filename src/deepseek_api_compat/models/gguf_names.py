"""What DeepSeek-V3's weights and settings are called in a GGUF file: llama.cpp's architecture `deepseek2`.

Sources: ggml's `docs/gguf.md`, and the keys and tensors that llama.cpp's loader asks for. Multi-token
prediction layers have no place in this architecture and are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from deepseek_api_compat.models.v3_config import Shape, V3Config

ARCHITECTURE = "deepseek2"
_SIGMOID = 2  # llama.cpp's `llama_expert_gating_func_type`

_ATTENTION = {
    "attn_q_a": "q_a_proj",
    "attn_q_a_norm": "q_a_layernorm",
    "attn_q_b": "q_b_proj",
    "attn_kv_a_mqa": "kv_a_proj_with_mqa",
    "attn_kv_a_norm": "kv_a_layernorm",
    "attn_output": "o_proj",
}
_MLP = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


class Target(NamedTuple):
    """One tensor of the GGUF file.

    shape: rows first, as numpy has it (a GGUF file lists it the other way round).
    sources: weights of the checkpoint, stacked in this order.
    exact: kept in float32 whatever the file's type, as llama.cpp wants it for norms and routers.
    part: of each head of the source, which rows these are: those that make keys, transposed, or those that
    make values. None: everything.
    """

    name: str
    shape: Shape
    sources: list[str]
    exact: bool = False
    part: Literal["keys", "values"] | None = None


def targets(config: V3Config) -> Iterator[Target]:
    """Every tensor of the file, in its order."""
    vocabulary = (config.vocab_size, config.hidden_size)
    yield Target("token_embd.weight", vocabulary, ["model.embed_tokens.weight"])
    yield Target("output_norm.weight", (config.hidden_size,), ["model.norm.weight"], exact=True)
    yield Target("output.weight", vocabulary, ["lm_head.weight"])
    shapes = config.tensors()
    for layer in range(config.num_hidden_layers):
        theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
        for name, source in _layer(config, layer):
            whole = f"{theirs}{source}"
            exact = len(shapes[whole]) == 1 or source == "mlp.gate.weight"
            yield Target(f"{ours}{name}", shapes[whole], [whole], exact)
        yield from _latent(config, f"{theirs}self_attn.kv_b_proj.weight", ours)
        if not config.is_dense(layer):
            yield from _experts(config, f"{theirs}mlp.experts.", ours)


def _layer(config: V3Config, layer: int) -> Iterator[tuple[str, str]]:
    """What is one tensor there and here: llama.cpp's name, the checkpoint's."""
    yield "attn_norm.weight", "input_layernorm.weight"
    for ours, theirs in _ATTENTION.items():
        yield f"{ours}.weight", f"self_attn.{theirs}.weight"
    yield "ffn_norm.weight", "post_attention_layernorm.weight"
    if config.is_dense(layer):
        for ours, theirs in _MLP.items():
            yield f"ffn_{ours}.weight", f"mlp.{theirs}.weight"
        return
    yield "ffn_gate_inp.weight", "mlp.gate.weight"
    yield "exp_probs_b.bias", "mlp.gate.e_score_correction_bias"
    for ours, theirs in _MLP.items():
        yield f"ffn_{ours}_shexp.weight", f"mlp.shared_experts.{theirs}.weight"


def _latent(config: V3Config, source: str, prefix: str) -> Iterator[Target]:
    """What makes keys and values of the latent vector: two tensors, with a matrix for each head.

    llama.cpp multiplies queries by the one and results by the other, so that it keeps latent vectors only.
    """
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    keys, values = (heads, latent, config.qk_nope_head_dim), (heads, config.v_head_dim, latent)
    yield Target(f"{prefix}attn_k_b.weight", keys, [source], part="keys")
    yield Target(f"{prefix}attn_v_b.weight", values, [source], part="values")


def _experts(config: V3Config, experts: str, prefix: str) -> Iterator[Target]:
    """The routed experts of a layer, in three tensors."""
    count, width, hidden = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
    for ours, theirs in _MLP.items():
        shape = (count, hidden, width) if ours == "down" else (count, width, hidden)
        sources = [f"{experts}{expert}.{theirs}.weight" for expert in range(count)]
        yield Target(f"{prefix}ffn_{ours}_exps.weight", shape, sources)


def settings(config: V3Config) -> dict[str, str | int | float | bool]:
    """The keys of `deepseek2` and their values. Integers are written as uint32, floats as float32."""
    latent, rotated = config.kv_lora_rank, config.qk_rope_head_dim
    values: dict[str, str | int | float | bool] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_shared_count": config.n_shared_experts,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
        "expert_gating_func": _SIGMOID,
        "expert_weights_norm": config.norm_topk_prob,
        "expert_weights_scale": config.routed_scaling_factor,
        "attention.head_count": config.num_attention_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": latent,
        # As llama.cpp computes: all heads share one key (the latent vector, what is rotated) and one value.
        "attention.head_count_kv": 1,
        "attention.key_length": latent + rotated,
        "attention.value_length": latent,
        # As the model is written: for each head.
        "attention.key_length_mla": config.query_width,
        "attention.value_length_mla": config.v_head_dim,
        "rope.dimension_count": rotated,
        "rope.freq_base": float(config.rope_theta),
        **_yarn(config),
    }
    return {f"{ARCHITECTURE}.{key}": value for key, value in values.items()}


def _yarn(config: V3Config) -> dict[str, str | int | float | bool]:
    yarn = config.rope_scaling
    if yarn is None:
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(yarn.factor),
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
        "rope.scaling.yarn_beta_fast": float(yarn.beta_fast),
        "rope.scaling.yarn_beta_slow": float(yarn.beta_slow),
        # llama.cpp expects the 0.1 of YaRN's formula in it.
        "rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim,
    }
