"""Builds a tiny DeepSeek-V3: the real architecture, tokenizer and file layout with small random weights.

It is for trying and testing engines: what it writes is no language. Nothing of DeepSeek-V3's computation is
left out: multi-head latent attention, a dense layer and then layers with routed experts in groups and a
shared one, sigmoid routing with a correction bias, YaRN, a multi-token prediction layer. The vocabulary is
the real one, and most of the file. kv_lora_rank, the head sizes and the FP8 blocks are the real ones too,
because engines have code for just these.

Weights are small integers times powers of two, drawn from the seed and the weight's name. BF16 and F16 hold
them exactly, and they are the same on every machine and with every version of numpy. Their scales are such
that each part of a layer matters, and that the best token is far enough ahead of the second for float32:
greedy output is then the same in every correct engine. The folder has it on record (`greedy.json`).
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fp8, safetensors_files
from deepseek_api_compat.models.deepseek_v3 import DeepSeekV3
from deepseek_api_compat.models.fp8 import Floats
from deepseek_api_compat.models.safetensors_files import SCALE, Stored, bfloat16
from deepseek_api_compat.models.v3_config import Shape, V3Config, read_config

GREEDY = "greedy.json"
SHARD_BYTES = 48_000_000
_BLOCK = (128, 128)
_WORDS = 128_000  # ids from here on are control tokens or stand for nothing
_CONTROLS = 3  # so are the first ids: begin, end, padding
_SPREAD = 73.3  # standard deviation of the integers from -127 to 127

# Everything that engines read in the real config.json is here, in its order; numbers are smaller where that
# changes nothing but the size.
_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 128,
    "moe_layer_freq": 1,
    "n_group": 4,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 128,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "torch_dtype": "float32",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
_QUANTISATION = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": list(_BLOCK),
}
_UNCHANGED: Mapping[str, Any] = MappingProxyType({})
_GENERATION = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
# V3's, without tools: the gateway writes prompts itself, this is for engines that are asked directly.
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% endif %}{% endfor %}"
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
)
_TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<｜begin▁of▁sentence｜>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "<｜end▁of▁sentence｜>",
    "model_max_length": 131072,
    "pad_token": "<｜end▁of▁sentence｜>",
    # The real file says LlamaTokenizerFast; transformers 5 makes another tokenizer of that, with other ids.
    "tokenizer_class": "PreTrainedTokenizerFast",
    "chat_template": _CHAT_TEMPLATE,
}
_USER, _ASSISTANT = 128803, 128804
_ANSWER = 32
# The least lead of each answered token's logit: ten times what half-precision attention moves logits here.
_LEAD = 0.05


class Greedy(msgspec.Struct, frozen=True):
    """A prompt, and the ids that the model answers with when it always takes the likeliest token.

    lead: by how much, at least, the logit of an answered token is above all others.
    """

    prompt: list[int]
    answer: list[int]
    lead: float


def build(folder: Path, tokenizer: Path, *, seed: int = 0, quantised: bool = False) -> Path:
    """Write the checkpoint; the folder may exist but must be empty. Takes seconds; about 160 MB.

    tokenizer: DeepSeek-V3's tokenizer.json. quantised: FP8 weights, as DeepSeek publishes them.
    Raises ModelError; what was written until then is taken away.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ModelError(f"{folder} is not empty; name a new folder.")
        part = folder.with_name(folder.name + ".part")
        shutil.rmtree(part, ignore_errors=True)  # of a run that was killed
        part.mkdir()
        try:
            _fill(part, tokenizer, seed, quantised)
            folder.rmdir()
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise ModelError(f"Can't write to {folder}: {error.strerror or error}.") from error
    return folder


def write_checkpoint(
    folder: Path,
    tokenizer: Path,
    *,
    seed: int = 0,
    quantised: bool = False,
    changes: Mapping[str, Any] = _UNCHANGED,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """All of the checkpoint but the record, into an existing folder. changes: of what config.json says."""
    fp8_settings = {"torch_dtype": "bfloat16", "quantization_config": _QUANTISATION} if quantised else {}
    _write_json(folder / "config.json", dict(sorted({**_CONFIG, **fp8_settings, **changes}.items())))
    _write_json(folder / "generation_config.json", _GENERATION)
    _write_json(folder / "tokenizer_config.json", _TOKENIZER_CONFIG)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    safetensors_files.write(folder, _tensors(read_config(folder), seed), shard_bytes)


def _fill(folder: Path, tokenizer: Path, seed: int, quantised: bool) -> None:
    write_checkpoint(folder, tokenizer, seed=seed, quantised=quantised)
    (folder / GREEDY).write_bytes(msgspec.json.encode(_answers(DeepSeekV3(folder))) + b"\n")


def _answers(model: DeepSeekV3) -> list[Greedy]:
    """A chat of one word, some words, and more words than engines prefill in one step."""
    chats = ([0, _USER, word, _ASSISTANT] for word in count(1000))
    words = ([0, *range(first, first + 24)] for first in count(1000))
    texts = ([0, *(3 + (first + 613 * step) % _WORDS for step in range(150))] for first in count())
    return [next(filter(None, (_answer(model, one) for one in kind))) for kind in (chats, words, texts)]


def _answer(model: DeepSeekV3, prompt: list[int]) -> Greedy | None:
    """None where some token is too close to a second one."""
    answer, leads = list[int](), list[float]()
    for token, lead in islice(model.greedy(prompt), _ANSWER):
        if lead < _LEAD:
            return None
        answer.append(token)
        leads.append(lead)
    return Greedy(prompt, answer, round(min(leads), 3))


def recorded(folder: Path) -> list[Greedy]:
    """The checkpoint's greedy record, or nothing if it has none. Raises ModelError if it can't be read."""
    try:
        return msgspec.json.decode((folder / GREEDY).read_bytes(), type=list[Greedy])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"Can't make sense of {folder / GREEDY}: {error}.") from None


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tensors(config: V3Config, seed: int) -> Iterator[tuple[str, Stored]]:
    for name, shape in config.tensors().items():
        weights = _weights(name, shape, seed)
        if config.quantization_config is None:
            # Matrices of the vocabulary as in the real files: as float32 they would double the size.
            vocabulary = shape[0] == config.vocab_size
            yield name, bfloat16(weights) if vocabulary else Stored("F32", weights)
        elif _is_quantised(name):
            codes, scales = fp8.quantise(weights, _BLOCK)
            yield name, Stored("F8_E4M3", codes)
            yield name + SCALE, Stored("F32", scales)
        else:
            yield name, Stored("F32", weights) if name.endswith("_bias") else bfloat16(weights)


def _is_quantised(name: str) -> bool:
    """Is it FP8 in the real checkpoint? The projections are; not embeddings, heads, norms and routers."""
    return "_proj" in name and not name.endswith(".eh_proj.weight")


def _weights(name: str, shape: Shape, seed: int) -> Floats:
    # MTP's embedding and head are copies of the model's, as in the real files.
    if name.endswith("embed_tokens.weight"):
        return _scaled(_integers("embed_tokens", shape, seed), -6)  # standard deviation 1.1
    if name == "lm_head.weight" or name.endswith(".head.weight"):
        return _head(shape, seed)
    if name.endswith("norm.weight"):
        return 1 + _scaled(np.trunc(_integers(name, shape, seed) / 8), -7)
    if name.endswith("_bias"):
        # Not below 0: experts of other groups score 0 in some engines, and minus infinity in others.
        return _scaled(np.abs(_integers(name, shape, seed)), -9)
    # What goes in has a standard deviation of about 1, and what comes out too.
    return _scaled(_integers(name, shape, seed), -round(math.log2(_SPREAD * math.sqrt(shape[1]))))


def _head(shape: Shape, seed: int) -> Floats:
    """Control tokens and ids without a token have the logit 0, so that the greedy choice is always a word."""
    head = _scaled(_integers("lm_head", shape, seed), -7)  # logits have a standard deviation of about 6
    head[:_CONTROLS] = 0
    head[_WORDS:] = 0
    return head


def _scaled(integers: Floats, power: int) -> Floats:
    return np.ldexp(integers, power)


def _integers(name: str, shape: Shape, seed: int) -> Floats:
    """Even draws from -127 to 127 (0 twice as often); numpy promises this stream for all its versions."""
    entropy = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest(), "big")
    size = math.prod(shape)
    raw = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(-(-size // 8))
    draws = raw.astype("<u8").view(np.int8)[:size].reshape(shape)
    return np.where(draws == -128, 0, draws).astype(np.float32)
