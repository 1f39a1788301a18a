"""GGUF files of tests: one of a few hundred bytes, and one that runs, with DeepSeek-V3's vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PIECES = ("a", "b", "é")


def write_gguf(
    path: Path,
    weights: np.ndarray,
    kind: gguf.GGMLQuantizationType,
    *,
    architecture: str = "llama",
    chat_template: str | None = "{{ messages }}",
    control: Sequence[str] = ("<s>",),
    user_defined: Sequence[str] = (),
    fim: Sequence[int] = (),
    tokenizer: str = "gpt2",
) -> Path:
    """A one-layer 'model': metadata of several types, one quantised matrix and one F32 vector.

    Its tokens are `PIECES`, then `control`, then `user_defined`. fim: ids for prefix, suffix and gap.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_file_type(3)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list([*PIECES, *control, *user_defined])
    types = [NORMAL] * len(PIECES) + [CONTROL] * len(control) + [USER_DEFINED] * len(user_defined)
    writer.add_token_types(types)
    for part, id in zip(("pre", "suf", "mid"), fim, strict=False):
        writer.add_uint32(f"tokenizer.ggml.fim_{part}_token_id", id)
    writer.add_add_bos_token(False)
    writer.add_rope_freq_base(10000.0)
    if chat_template is not None:
        writer.add_chat_template(chat_template)
    writer.add_tensor("blk.0.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.norm", np.arange(8, dtype=np.float32))
    _write(writer)
    return path


HIDDEN = 32
VOCABULARY = 129280  # of the model; the tokenizer's file has fewer


def write_deepseek(path: Path, tokenizer: Path, chat_template: str) -> Path:
    """A Llama of one layer and random weights that runs, with the vocabulary of DeepSeek's tokenizer.json.

    Types of tokens as llama.cpp's `convert_hf_to_gguf.py` gives them. Takes about a second; 13 MB.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny DeepSeek")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_vocabulary(writer, json.loads(tokenizer.read_bytes()))
    writer.add_chat_template(chat_template)
    _add_weights(writer)
    _write(writer)
    return path


def _add_vocabulary(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    tokens = [f"[PAD{id}]" for id in range(VOCABULARY)]
    types = [UNUSED] * VOCABULARY
    for text, id in tokenizer["model"]["vocab"].items():
        tokens[id], types[id] = text, NORMAL
    for added in tokenizer["added_tokens"]:
        id, text = added["id"], added["content"]
        tokens[id] = text
        types[id] = CONTROL if added["special"] or text.startswith(("<|", "<｜")) else USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = tokenizer["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_add_bos_token(False)


def _add_weights(writer: gguf.GGUFWriter) -> None:
    random = np.random.default_rng(0)
    square = (HIDDEN, HIDDEN)
    matrices = {f"blk.0.{name}.weight": square for name in ("ffn_gate", "ffn_up", "ffn_down", "attn_output")}
    matrices |= {f"blk.0.attn_{letter}.weight": square for letter in "qkv"}
    matrices["token_embd.weight"] = (VOCABULARY, HIDDEN)
    for name, shape in matrices.items():
        writer.add_tensor(name, (random.normal(size=shape) * 0.1).astype(np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
