"""A GGUF of a few hundred bytes, for what needs the format and not a model."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, weights: np.ndarray, kind: gguf.GGMLQuantizationType) -> Path:
    """A one-layer 'model': metadata of several types, one quantised matrix and one F32 vector."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_context_length(128)
    writer.add_file_type(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b", "é"])
    writer.add_token_types([1, 1, 3])
    writer.add_add_bos_token(False)
    writer.add_rope_freq_base(10000.0)
    writer.add_chat_template("{{ messages }}")
    writer.add_tensor("blk.0.weight", gguf.quants.quantize(weights, kind), raw_dtype=kind)
    writer.add_tensor("blk.0.norm", np.arange(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
