"""DeepSeek-V3 in numpy: slow, short and readable, to check engines against and to read.

It computes in float32, one sequence at a time, from the published files (FP8 ones too). Sections and
equations are those of the technical report, arXiv 2412.19437. Multi-token prediction layers (section 2.2) are
not part of answering, and are left out. For toy sizes: all weights are held in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from deepseek_api_compat.models.fp8 import Floats
from deepseek_api_compat.models.safetensors_files import Weights
from deepseek_api_compat.models.v3_config import V3Config, Yarn, read_config

Ids: TypeAlias = npt.NDArray[np.intp]


class _Cache(NamedTuple):
    """What a layer keeps of the tokens so far: for each head and token its key and value."""

    keys: Floats  # (heads, tokens, query_width)
    values: Floats  # (heads, tokens, v_head_dim)


class Sequence:
    """One sequence in the making: append tokens, get logits."""

    def __init__(self, model: DeepSeekV3) -> None:
        self._model = model
        self._caches: list[_Cache | None] = [None] * model.config.num_hidden_layers
        self._length = 0

    def extend(self, ids: list[int]) -> Floats:
        """Append the tokens; returns the logits (vocabulary) of what comes after the last one."""
        model = self._model
        hidden = model.weights["model.embed_tokens.weight"][ids]
        positions = np.arange(self._length, self._length + len(ids))
        self._length += len(ids)
        for layer in range(model.config.num_hidden_layers):
            hidden, self._caches[layer] = model.layer(layer, hidden, positions, self._caches[layer])
        last = model.norm("model.norm", hidden[-1:])
        logits: Floats = model.linear("lm_head", last)[0]
        return logits


class DeepSeekV3:
    """The model of a folder."""

    def __init__(self, folder: Path) -> None:
        """Reads all weights. Raises ModelError if the folder holds no DeepSeek-V3, or not all of it."""
        self.config = config = read_config(folder)
        block = config.quantization_config.weight_block_size if config.quantization_config else (128, 128)
        stored = Weights(folder, block)
        stored.check(config.tensors())
        skipped = tuple(f"model.layers.{layer}." for layer in config.layers[config.num_hidden_layers :])
        names = [name for name in config.tensors() if not name.startswith(skipped)]
        self.weights = {name: stored.read(name) for name in names}
        self._frequencies = _frequencies(config)
        self._scale = _attention_scale(config)

    def greedy(self, prompt: list[int]) -> Iterator[tuple[int, float]]:
        """The ids that follow the prompt, without end, when the likeliest token is taken each time.

        With each comes its lead: how far its logit is above the second one.
        """
        sequence = Sequence(self)
        logits = sequence.extend(prompt)
        while True:
            second, first = np.partition(logits, -2)[-2:]
            best = int(logits.argmax())
            yield best, float(first - second)
            logits = sequence.extend([best])

    def layer(
        self, layer: int, hidden: Floats, positions: Ids, cache: _Cache | None
    ) -> tuple[Floats, _Cache]:
        """One decoder layer: attention, then experts (or one wide network), each added to what goes in."""
        prefix = f"model.layers.{layer}."
        normed = self.norm(f"{prefix}input_layernorm", hidden)
        attended, cache = self._attention(f"{prefix}self_attn.", normed, positions, cache)
        hidden = hidden + attended
        normed = self.norm(f"{prefix}post_attention_layernorm", hidden)
        mlp = self._mlp if self.config.is_dense(layer) else self._experts
        return hidden + mlp(f"{prefix}mlp.", normed), cache

    def linear(self, name: str, inputs: Floats) -> Floats:
        outputs: Floats = inputs @ self.weights[f"{name}.weight"].T
        return outputs

    def norm(self, name: str, inputs: Floats) -> Floats:
        """RMSNorm over the last axis."""
        mean = np.mean(inputs * inputs, axis=-1, keepdims=True)
        normed: Floats = inputs / np.sqrt(mean + np.float32(self.config.rms_norm_eps))
        return normed * self.weights[f"{name}.weight"]

    def _attention(
        self, prefix: str, inputs: Floats, positions: Ids, cache: _Cache | None
    ) -> tuple[Floats, _Cache]:
        """Multi-head latent attention, section 2.1.1.

        Keys and values come from one latent vector of kv_lora_rank numbers; what carries the position is a
        second, rotated key that all heads share. (Engines keep latent vectors instead of keys and values.)
        """
        c = self.config
        queries = self.norm(f"{prefix}q_a_layernorm", self.linear(f"{prefix}q_a_proj", inputs))
        queries = self._heads(self.linear(f"{prefix}q_b_proj", queries))
        plain, rotated = np.split(queries, [c.qk_nope_head_dim], axis=-1)
        queries = np.concatenate([plain, self._rotate(rotated, positions)], axis=-1)

        latent, shared = np.split(
            self.linear(f"{prefix}kv_a_proj_with_mqa", inputs), [c.kv_lora_rank], axis=-1
        )
        latent = self.norm(f"{prefix}kv_a_layernorm", latent)
        expanded = self._heads(self.linear(f"{prefix}kv_b_proj", latent))
        plain, values = np.split(expanded, [c.qk_nope_head_dim], axis=-1)
        shared = np.broadcast_to(
            self._rotate(shared[None], positions), (*plain.shape[:2], c.qk_rope_head_dim)
        )
        cache = _extended(cache, np.concatenate([plain, shared], axis=-1), values)

        scores = queries @ cache.keys.transpose(0, 2, 1) * self._scale
        future = np.arange(cache.keys.shape[1]) > positions[:, None]
        outputs = _softmax(np.where(future, np.float32(-np.inf), scores)) @ cache.values
        joined = outputs.transpose(1, 0, 2).reshape(len(inputs), -1)
        return self.linear(f"{prefix}o_proj", joined), cache

    def _heads(self, rows: Floats) -> Floats:
        """(tokens, heads x width) as (heads, tokens, width)."""
        heads: Floats = rows.reshape(len(rows), self.config.num_attention_heads, -1).transpose(1, 0, 2)
        return heads

    def _rotate(self, vectors: Floats, positions: Ids) -> Floats:
        """Rotary position embedding: each pair of neighbouring numbers turns by position x frequency."""
        angles = np.outer(positions, self._frequencies)
        cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
        even, odd = vectors[..., 0::2], vectors[..., 1::2]
        turned: Floats = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
        return turned.reshape(vectors.shape)

    def _mlp(self, prefix: str, inputs: Floats) -> Floats:
        gate = self.linear(f"{prefix}gate_proj", inputs)
        return self.linear(f"{prefix}down_proj", _silu(gate) * self.linear(f"{prefix}up_proj", inputs))

    def _experts(self, prefix: str, inputs: Floats) -> Floats:
        """DeepSeekMoE, section 2.1.2: the shared expert for every token, and routed ones that it chooses."""
        outputs = self._mlp(f"{prefix}shared_experts.", inputs)
        chosen, shares = self.route(prefix, inputs)
        for expert in range(self.config.n_routed_experts):
            tokens, places = np.nonzero(chosen == expert)
            if len(tokens):
                share = shares[tokens, places][:, None]
                outputs[tokens] += share * self._mlp(f"{prefix}experts.{expert}.", inputs[tokens])
        return outputs

    def route(self, prefix: str, inputs: Floats) -> tuple[Ids, Floats]:
        """Which experts each token goes to, and the share of each: both (tokens, num_experts_per_tok).

        The bias decides who is chosen and not how much it counts (equations 13 to 16). Experts of the best
        groups only, a group being as good as its two best experts.
        """
        c = self.config
        affinity = 1 / (1 + np.exp(-self.linear(f"{prefix}gate", inputs)))
        biased = affinity + self.weights[f"{prefix}gate.e_score_correction_bias"]
        groups = biased.reshape(len(inputs), c.n_group, -1)
        merit = np.sort(groups, axis=-1)[..., -2:].sum(axis=-1)
        outside = np.argsort(-merit, axis=-1, kind="stable")[:, c.topk_group :]
        np.put_along_axis(groups, outside[..., None], -np.inf, axis=1)  # a view: `biased` changes
        chosen = np.argsort(-biased, axis=-1, kind="stable")[:, : c.num_experts_per_tok]
        shares = np.take_along_axis(affinity, chosen, axis=-1)
        if c.norm_topk_prob:
            shares = shares / (shares.sum(axis=-1, keepdims=True) + np.float32(1e-20))
        return chosen, shares * np.float32(c.routed_scaling_factor)


def _extended(cache: _Cache | None, keys: Floats, values: Floats) -> _Cache:
    if cache is None:
        return _Cache(keys, values)
    joined = (np.concatenate(pair, axis=1) for pair in ((cache.keys, keys), (cache.values, values)))
    return _Cache(*joined)


def _softmax(scores: Floats) -> Floats:
    exponentials: Floats = np.exp(scores - scores.max(axis=-1, keepdims=True))
    exponentials /= exponentials.sum(axis=-1, keepdims=True)
    return exponentials


def _silu(inputs: Floats) -> Floats:
    outputs: Floats = inputs / (1 + np.exp(-inputs))
    return outputs


def _frequencies(config: V3Config) -> npt.NDArray[np.float64]:
    """Radians per position of each pair.

    YaRN (arXiv 2309.00071, section 3.2) slows the slow ones by its factor: fully those that make fewer than
    beta_slow turns over the first training's context, not those that make more than beta_fast, and in part
    those in between.
    """
    width = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, width, 2) / width)
    yarn = config.rope_scaling
    if yarn is None:
        return frequencies
    first, last = (_pair_of(turns, config, yarn) for turns in (yarn.beta_fast, yarn.beta_slow))
    low, high = max(math.floor(first), 0), min(math.ceil(last), width - 1)
    slowed = np.clip((np.arange(width // 2) - low) / max(high - low, 0.001), 0, 1)
    stretched: npt.NDArray[np.float64] = frequencies * (1 - slowed + slowed / yarn.factor)
    return stretched


def _pair_of(turns: float, config: V3Config, yarn: Yarn) -> float:
    """The (fractional) index of the pair that makes so many turns over the first training's context."""
    wavelengths = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
    return config.qk_rope_head_dim * math.log(wavelengths) / (2 * math.log(config.rope_theta))


def _attention_scale(config: V3Config) -> float:
    """1/sqrt of a query's width; YaRN makes scores larger where contexts are longer."""
    scale = 1 / math.sqrt(config.query_width)
    yarn = config.rope_scaling
    if yarn and yarn.mscale_all_dim and yarn.factor > 1:
        scale *= (0.1 * yarn.mscale_all_dim * math.log(yarn.factor) + 1) ** 2
    return scale
