"""The numbers of a DeepSeek-V3 `config.json`, and the weights that follow from them.

Names and shapes are those of the published checkpoints (DeepSeek-V3, R1, V3.1); the architecture is that of
arXiv 2412.19437, section 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

from deepseek_api_compat.errors import ModelError

Shape = tuple[int, ...]


class Yarn(msgspec.Struct, frozen=True):
    """How rotations are stretched beyond the context of the first training (arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32
    beta_slow: float = 1
    mscale: float = 1.0
    mscale_all_dim: float = 0.0
    type: str = "yarn"


class Quantisation(msgspec.Struct, frozen=True):
    """FP8 weights, with one scale for each block of `weight_block_size` (rows, columns)."""

    quant_method: str
    weight_block_size: tuple[int, int] = (128, 128)
    fmt: str = "e4m3"


class V3Config(msgspec.Struct, frozen=True, kw_only=True):
    """What of config.json decides the weights and the computation."""

    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    n_group: int
    topk_group: int
    routed_scaling_factor: float
    norm_topk_prob: bool
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    model_type: str = "deepseek_v3"
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    moe_layer_freq: int = 1
    num_nextn_predict_layers: int = 0
    bos_token_id: int = 0
    eos_token_id: int = 1
    rope_scaling: Yarn | None = None
    quantization_config: Quantisation | None = None

    @property
    def query_width(self) -> int:
        """Of one head: the part without and the part with rotation."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def layers(self) -> range:
        """All layers in the files: the model's, then those of multi-token prediction (MTP)."""
        return range(self.num_hidden_layers + self.num_nextn_predict_layers)

    def is_dense(self, layer: int) -> bool:
        return layer < self.first_k_dense_replace

    def tensors(self) -> dict[str, Shape]:
        """Every weight by its name, with its shape (outputs, inputs), in the order of the files."""
        return dict(self._tensors())

    def _tensors(self) -> Iterator[tuple[str, Shape]]:
        vocabulary = (self.vocab_size, self.hidden_size)
        yield "model.embed_tokens.weight", vocabulary
        for layer in range(self.num_hidden_layers):
            yield from self.layer(layer)
        yield "model.norm.weight", (self.hidden_size,)
        yield "lm_head.weight", vocabulary
        for layer in self.layers[self.num_hidden_layers :]:
            yield from self._prediction(layer)

    def layer(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """The weights of one decoder layer."""
        prefix = f"model.layers.{layer}."
        yield f"{prefix}input_layernorm.weight", (self.hidden_size,)
        yield from self._attention(f"{prefix}self_attn.")
        yield f"{prefix}post_attention_layernorm.weight", (self.hidden_size,)
        if self.is_dense(layer):
            yield from self._mlp(f"{prefix}mlp.", self.intermediate_size)
        else:
            yield from self._experts(f"{prefix}mlp.")

    def _attention(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        heads, hidden = self.num_attention_heads, self.hidden_size
        yield f"{prefix}q_a_proj.weight", (self.q_lora_rank, hidden)
        yield f"{prefix}q_a_layernorm.weight", (self.q_lora_rank,)
        yield f"{prefix}q_b_proj.weight", (heads * self.query_width, self.q_lora_rank)
        yield f"{prefix}kv_a_proj_with_mqa.weight", (self.kv_lora_rank + self.qk_rope_head_dim, hidden)
        yield f"{prefix}kv_a_layernorm.weight", (self.kv_lora_rank,)
        kv = heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield f"{prefix}kv_b_proj.weight", (kv, self.kv_lora_rank)
        yield f"{prefix}o_proj.weight", (hidden, heads * self.v_head_dim)

    def _experts(self, prefix: str) -> Iterator[tuple[str, Shape]]:
        yield f"{prefix}gate.weight", (self.n_routed_experts, self.hidden_size)
        yield f"{prefix}gate.e_score_correction_bias", (self.n_routed_experts,)
        for expert in range(self.n_routed_experts):
            yield from self._mlp(f"{prefix}experts.{expert}.", self.moe_intermediate_size)
        shared = self.n_shared_experts * self.moe_intermediate_size
        yield from self._mlp(f"{prefix}shared_experts.", shared)

    def _mlp(self, prefix: str, width: int) -> Iterator[tuple[str, Shape]]:
        yield f"{prefix}gate_proj.weight", (width, self.hidden_size)
        yield f"{prefix}up_proj.weight", (width, self.hidden_size)
        yield f"{prefix}down_proj.weight", (self.hidden_size, width)

    def _prediction(self, layer: int) -> Iterator[tuple[str, Shape]]:
        """An MTP module: a decoder layer, and copies of the embedding and the output head."""
        prefix, hidden = f"model.layers.{layer}.", self.hidden_size
        yield f"{prefix}embed_tokens.weight", (self.vocab_size, hidden)
        yield f"{prefix}enorm.weight", (hidden,)
        yield f"{prefix}hnorm.weight", (hidden,)
        yield f"{prefix}eh_proj.weight", (hidden, 2 * hidden)
        yield from self.layer(layer)
        yield f"{prefix}shared_head.norm.weight", (hidden,)
        yield f"{prefix}shared_head.head.weight", (self.vocab_size, hidden)


def read_config(folder: Path) -> V3Config:
    """Of the checkpoint in that folder. Raises ModelError if it isn't a DeepSeek-V3's."""
    path = folder / "config.json"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelError(f"Can't read {path}: {error.strerror}.") from None
    try:
        config = msgspec.json.decode(data, type=V3Config)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"{path} is not that of a DeepSeek-V3: {error}.") from None
    if reason := _unlike_v3(config):
        raise ModelError(f"{path} is not that of a DeepSeek-V3: {reason}.")
    return config


def _unlike_v3(config: V3Config) -> str:
    """What this code would compute wrongly; "" if nothing."""
    expected = {
        "model_type": "deepseek_v3",
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
    }
    for key, value in expected.items():
        if getattr(config, key) != value:
            return f"{key} is {getattr(config, key)!r} and not {value!r}"
    quantisation = config.quantization_config
    if quantisation and (quantisation.quant_method, quantisation.fmt) != ("fp8", "e4m3"):
        return f"its weights are {quantisation.quant_method} {quantisation.fmt}, and only fp8 e4m3 is known"
    if config.rope_scaling and config.rope_scaling.type != "yarn":
        return f"its positions are scaled by {config.rope_scaling.type!r}, and only 'yarn' is known"
    if config.rope_scaling and config.rope_scaling.mscale != config.rope_scaling.mscale_all_dim:
        return "mscale and mscale_all_dim of its rope_scaling differ"
    if config.n_routed_experts % config.n_group:
        return f"{config.n_routed_experts} experts don't make {config.n_group} equal groups"
    return ""
