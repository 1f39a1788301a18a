"""How many parameters a model has, part by part, from its `config.json`: what launch plans go by.

DeepSeek-V2 and V3 (MLA, experts), and dense or expert models with grouped query attention by the keys of
Llama, Mistral, Mixtral and Qwen. Norms are counted; biases, some thousandths of a per cent, are not.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue

# Others may have the same keys and another attention, so that the arithmetic would be wrong without a word.
KNOWN_TYPES = frozenset(
    {
        *("deepseek_v2", "deepseek_v3", "deepseek_v32", "kimi_k2"),
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"),
    }
)
V3_CONFIG = Path(__file__).with_name("deepseek_v3_config.json")
# V3.2's lightning indexer, which its attention has besides V3's (config.json of DeepSeek-V3.2-Exp).
V32_INDEXER = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
INDEXER_CACHE = 128 + 4  # bytes a token and layer for 128 dimensions: FP8, and one FP32 scale

Split = Literal["none", "tensor", "kv", "expert"]


class Part(msgspec.Struct, frozen=True):
    """Parameters that lie together.

    split: who shares them: nobody, the ranks of a tensor parallel group, as many of these as there are
    key-value heads, or all ranks that share the experts. quantised: False for what stays BF16 in
    quantised checkpoints.
    """

    name: Literal["attention", "dense FFN", "shared experts", "routed experts", "router, norms", "embeddings"]
    parameters: int
    split: Split
    quantised: bool = True


class Architecture(msgspec.Struct, frozen=True, kw_only=True):
    """The keys of a config.json that decide its size, by the names of the Hugging Face checkpoints."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    intermediate_size: int
    max_position_embeddings: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    kv_lora_rank: int | None = None
    q_lora_rank: int | None = None
    qk_nope_head_dim: int = 0
    qk_rope_head_dim: int = 0
    v_head_dim: int = 0
    n_routed_experts: int | None = None
    num_experts: int | None = None
    num_local_experts: int | None = None
    num_experts_per_tok: int | None = None
    n_shared_experts: int | None = None
    shared_expert_intermediate_size: int = 0
    moe_intermediate_size: int | None = None
    first_k_dense_replace: int = 0
    moe_layer_freq: int = 1
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] = []
    num_nextn_predict_layers: int = 0
    index_n_heads: int = 0
    index_head_dim: int = 0
    quantization_config: dict[str, Any] | None = None

    @property
    def latent(self) -> bool:
        """Whether its attention is MLA, which keeps one latent vector for all heads."""
        return self.kv_lora_rank is not None

    @property
    def experts(self) -> int:
        """Routed experts of a layer; 0 for a dense model."""
        return self.n_routed_experts or self.num_experts or self.num_local_experts or 0

    @property
    def active_experts(self) -> int:
        return self.num_experts_per_tok or 0

    @property
    def kv_heads(self) -> int:
        """Heads that keys and values are kept for: what tensor parallelism can split of the KV cache."""
        return 1 if self.latent else self.num_key_value_heads or self.num_attention_heads

    @property
    def native(self) -> str:
        """How its published weights are kept: `fp8`, or `bf16`, or what the configuration calls it."""
        return str((self.quantization_config or {}).get("quant_method", "bf16"))

    def layer(self, number: int) -> Iterator[Part]:
        """The parts of one decoder layer."""
        yield from self._latent_attention() if self.latent else self._grouped_attention()
        yield Part("router, norms", 2 * self.hidden_size, "none", quantised=False)
        if not self.experts or number < self.first_k_dense_replace:
            yield Part("dense FFN", 3 * self.hidden_size * self.intermediate_size, "tensor")
            return
        expert = 3 * self.hidden_size * (self.moe_intermediate_size or self.intermediate_size)
        shared = (self.n_shared_experts or 0) * expert
        shared += 3 * self.hidden_size * self.shared_expert_intermediate_size
        bias = self.experts if self.model_type in ("deepseek_v3", "deepseek_v32", "kimi_k2") else 0
        yield Part("router, norms", self.experts * self.hidden_size + bias, "none", quantised=False)
        yield Part("shared experts", shared, "tensor")
        yield Part("routed experts", self.experts * expert, "expert")

    def embedding(self) -> Part:
        """The input embedding; the output head, where it is one of its own, is as large."""
        return Part("embeddings", self.vocab_size * self.hidden_size, "tensor", quantised=False)

    def final_norm(self) -> Part:
        return Part("router, norms", self.hidden_size, "none", quantised=False)

    def model(self) -> Iterator[Part]:
        """All parts of the model itself, without multi-token prediction."""
        yield self.embedding()
        if not self.tie_word_embeddings:
            yield self.embedding()
        yield self.final_norm()
        for number in range(self.num_hidden_layers):
            yield from self.layer(number)

    def prediction(self) -> Iterator[Part]:
        """Multi-token prediction (MTP) modules: a layer each, a projection, copies of both embeddings."""
        for number in range(self.num_nextn_predict_layers):
            yield self.embedding()
            yield self.embedding()
            yield Part("dense FFN", 2 * self.hidden_size**2, "none")
            yield Part("router, norms", 3 * self.hidden_size, "none", quantised=False)
            yield from self.layer(self.num_hidden_layers + number)

    def active(self) -> int:
        """Parameters multiplied for one token: all but the input embedding and the experts left out."""
        total = 0
        for part in self.model():
            if part.name == "routed experts":
                total += part.parameters * self.active_experts // self.experts
            else:
                total += part.parameters
        return total if self.tie_word_embeddings else total - self.embedding().parameters

    def absorbed(self) -> int:
        """Parameters a layer that engines keep once more in BF16: MLA's up-projections, absorbed."""
        heads = self.num_attention_heads
        return heads * (self.qk_nope_head_dim + self.v_head_dim) * (self.kv_lora_rank or 0)

    def cached(self, *, fp8: bool = False) -> int:
        """Bytes of the KV cache for a token in one layer, over all heads, in BF16 or FP8."""
        if self.latent:
            values = (self.kv_lora_rank or 0) + self.qk_rope_head_dim
        else:
            values = 2 * self.kv_heads * self._head_width()
        return values * (1 if fp8 else 2) + (INDEXER_CACHE if self.index_head_dim else 0)

    def _head_width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def _latent_attention(self) -> Iterator[Part]:
        hidden, heads, rank = self.hidden_size, self.num_attention_heads, self.kv_lora_rank or 0
        query = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        if self.q_lora_rank:
            yield Part("attention", hidden * self.q_lora_rank, "none")
            yield Part("router, norms", self.q_lora_rank, "none", quantised=False)
        yield Part("attention", (self.q_lora_rank or hidden) * query, "tensor")
        yield Part("attention", hidden * (rank + self.qk_rope_head_dim), "none")
        yield Part("router, norms", rank, "none", quantised=False)
        yield Part("attention", self.absorbed(), "tensor")
        yield Part("attention", heads * self.v_head_dim * hidden, "tensor")
        if self.index_head_dim:
            width = self.index_head_dim
            index = (self.q_lora_rank or hidden) * self.index_n_heads * width + hidden * width
            yield Part("attention", index, "none")
            yield Part("router, norms", hidden * self.index_n_heads + 2 * width, "none", quantised=False)

    def _grouped_attention(self) -> Iterator[Part]:
        hidden, width = self.hidden_size, self._head_width()
        yield Part("attention", 2 * hidden * self.num_attention_heads * width, "tensor")
        yield Part("attention", 2 * hidden * self.kv_heads * width, "kv")
        if self.model_type.startswith("qwen3"):
            yield Part("router, norms", 2 * width, "none", quantised=False)


class Known(msgspec.Struct, frozen=True):
    """A model to plan for: its name for clients, where its weights are, how its prompts are written."""

    name: str
    path: str
    format: str
    architecture: Architecture


def find_model(named: str) -> Known:
    """A V3 or R1 of the catalogue by name, a folder with config.json, or such a file. Raises ModelError."""
    path = Path(named)
    if path.is_dir() or path.suffix == ".json":
        file = path / "config.json" if path.is_dir() else path
        folder = file.resolve().parent
        return Known(folder.name, str(folder), "auto", read_architecture(file))
    entry = catalogue.find(named)
    if not isinstance(entry.source, catalogue.Repository) or not _is_v3(named):
        raise ModelError(f"What {named} is made of is not known here: give the folder with its config.json.")
    config = msgspec.json.decode(V3_CONFIG.read_bytes())
    if named.startswith("deepseek-v3.2"):
        config |= V32_INDEXER
    return Known(named, entry.source.repo, entry.format or "auto", _architecture(config, named))


def read_architecture(file: Path) -> Architecture:
    """Of a config.json. Raises ModelError if it can't be read, or if this is not that model's arithmetic."""
    try:
        config = msgspec.json.decode(file.read_bytes())
    except OSError as error:
        raise ModelError(f"Can't read {file}: {error.strerror}.") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}.") from None
    return _architecture(config, str(file))


def _architecture(config: Any, where: str) -> Architecture:
    try:
        found = msgspec.convert(config, Architecture)
    except msgspec.ValidationError as error:
        raise ModelError(f"{where} does not describe a language model: {error}.") from None
    if found.model_type not in KNOWN_TYPES:
        raise ModelError(f"{where}: the sizes of a {found.model_type!r} are not known here.")
    if found.moe_layer_freq != 1 or found.decoder_sparse_step != 1 or found.mlp_only_layers:
        raise ModelError(f"{where}: experts in only some layers are not known here.")
    counts = (found.hidden_size, found.num_hidden_layers, found.num_attention_heads, found.vocab_size)
    if min(counts) < 1:
        raise ModelError(f"{where} has sizes below 1.")
    return found


def _is_v3(name: str) -> bool:
    return name.startswith(("deepseek-v3", "deepseek-r1")) and "distill" not in name and "qwen" not in name
