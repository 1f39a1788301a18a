"""GGUF files of tests: one of a few hundred bytes, and tiny ones that run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
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
VOCABULARY = 129280  # of DeepSeek's models; the tokenizer's file has fewer


def write_deepseek(path: Path, tokenizer: Path, chat_template: str) -> Path:
    """A Llama of one layer and random weights that runs, with the vocabulary of DeepSeek's tokenizer.json.

    Types of tokens as llama.cpp's `convert_hf_to_gguf.py` gives them. Takes about a second; 13 MB.
    """
    writer = _llama(path)
    _add_vocabulary(writer, json.loads(tokenizer.read_bytes()))
    writer.add_chat_template(chat_template)
    _add_weights(writer, VOCABULARY)
    _write(writer)
    return path


def write_sentencepiece(path: Path) -> Path:
    """A Llama that runs, with a SentencePiece vocabulary whose pieces merge into `</s>`; no chat template."""
    control = ["<s>", "</s>"]
    pieces = ["▁", "<", "/", "s", ">", "a", "b", "</", "s>", "▁a"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    writer = _llama(path)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", *control, *bytes_, *pieces])
    writer.add_token_scores([0.0] * 259 + [-float(rank) for rank in range(len(pieces))])
    writer.add_token_types([UNKNOWN] + [CONTROL] * len(control) + [BYTE] * 256 + [NORMAL] * len(pieces))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _add_weights(writer, 259 + len(pieces))
    _write(writer)
    return path


def _llama(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    return writer


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


def _add_weights(writer: gguf.GGUFWriter, tokens: int) -> None:
    random = np.random.default_rng(0)
    square = (HIDDEN, HIDDEN)
    matrices = {f"blk.0.{name}.weight": square for name in ("ffn_gate", "ffn_up", "ffn_down", "attn_output")}
    matrices |= {f"blk.0.attn_{letter}.weight": square for letter in "qkv"}
    matrices["token_embd.weight"] = (tokens, HIDDEN)
    for name, shape in matrices.items():
        writer.add_tensor(name, (random.normal(size=shape) * 0.1).astype(np.float16))
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(HIDDEN, np.float32))


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
