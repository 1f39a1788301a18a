"""Turns a DeepSeek-V3 checkpoint of Hugging Face's layout into a GGUF file, for llama.cpp.

Weights are read, computed and written in pieces of some megabytes, so that memory does not grow with the
model: one that fits on the disk can be converted.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import gguf
import numpy as np

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import gguf_names, gguf_vocabulary, shelf
from deepseek_api_compat.models.fp8 import Floats
from deepseek_api_compat.models.gguf_names import ARCHITECTURE, Target
from deepseek_api_compat.models.progress import Progress, size
from deepseek_api_compat.models.safetensors_files import Weights
from deepseek_api_compat.models.v3_config import V3Config, read_config

Type = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]

_ALIGNMENT = 32  # of each tensor's data; GGUF's default
_PIECE = 4_000_000  # weights at a time: 16 MB as float32
_FILE_TYPES: dict[Type, int] = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}  # llama.h `llama_ftype`
_QUANTISATION_VERSION = 2  # ggml.h `GGML_QNT_VERSION`


class _Planned(NamedTuple):
    """A tensor of the file, its type (of `gguf.GGMLQuantizationType`) and its size there."""

    target: Target
    kind: Any
    bytes: int


def to_gguf(folder: Path, path: Path, type: Type, progress: Progress | None = None) -> None:
    """Write the checkpoint of `folder` to the new file `path`, its matrices in that type.

    FP8 weights are dequantised first; multi-token prediction layers are left out. The file appears only when
    it is complete. Raises ModelError, which names what is missing.
    """
    if path.exists():
        raise ModelError(f"{path} is already there; name a new file.")
    config = read_config(folder)
    quantisation = config.quantization_config
    weights = Weights(folder, quantisation.weight_block_size if quantisation else (128, 128))
    planned = [_plan(target, type) for target in gguf_names.targets(config)]
    shapes = config.tensors()
    weights.check({source: shapes[source] for tensor in planned for source in tensor.target.sources})
    part = path.with_name(path.name + shelf.PART)
    try:
        _need_space(path.absolute().parent, sum(tensor.bytes for tensor in planned))
        _write_header(part, folder, config, type, planned)
        with part.open("ab") as file:
            _write_data(file, weights, config, planned, progress or Progress())
        shelf.publish(part, path)
    except OSError as error:
        raise ModelError(f"Can't write {path}: {error.strerror or error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _plan(target: Target, type: Type) -> _Planned:
    kinds = gguf.GGMLQuantizationType
    kind = kinds.F32 if target.exact else kinds[type.upper()]
    if kind == kinds.Q4_0 and target.name == "output.weight":
        kind = kinds.Q8_0  # 4 bits are too few here; llama.cpp's own quantiser gives it more, too
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if target.shape[-1] % block:
        kind, block, block_bytes = kinds.F16, 1, 2
    return _Planned(target, kind, math.prod(target.shape) // block * block_bytes)


def _need_space(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ModelError(f"The file needs {size(needed)}, and {place} has {size(free)} free.")


def _write_header(part: Path, folder: Path, config: V3Config, type: Type, planned: list[_Planned]) -> None:
    """All of the file but the data of its tensors."""
    writer = gguf.GGUFWriter(part, ARCHITECTURE)
    writer.add_type("model")
    writer.add_name(folder.absolute().name)
    writer.add_file_type(_FILE_TYPES[type])
    writer.add_quantization_version(_QUANTISATION_VERSION)
    for key, value in gguf_names.settings(config).items():
        _add(writer, key, value)
    for key, value in gguf_vocabulary.settings(folder, config).items():
        _add(writer, key, value)
    for tensor in planned:
        shape = tensor.target.shape
        writer.add_tensor_info(tensor.target.name, shape, np.dtype(np.float32), tensor.bytes, tensor.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add(writer: Any, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _write_data(
    file: BinaryIO, weights: Weights, config: V3Config, planned: list[_Planned], progress: Progress
) -> None:
    # Not through the writer: it takes whole tensors, and the experts of one layer are 15 GB as float32.
    with progress.bar("Converting", sum(tensor.bytes for tensor in planned)) as bar:
        for tensor in planned:
            _pad(file)
            for piece in _pieces(tensor.target, weights, config):
                bar.add(file.write(gguf.quants.quantize(piece, tensor.kind).tobytes()))
        _pad(file)


def _pad(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % _ALIGNMENT))


def _pieces(target: Target, weights: Weights, config: V3Config) -> Iterator[Floats]:
    """The tensor's weights in order: some rows at a time."""
    for source in target.sources:
        if target.part:
            yield from _of_heads(target, source, weights, config)
        elif len(target.shape) == 1:
            yield weights.read(source)
        else:
            rows, step = target.shape[-2], max(1, _PIECE // target.shape[-1])
            for start in range(0, rows, step):
                yield weights.rows(source, start, min(start + step, rows))


def _of_heads(target: Target, source: str, weights: Weights, config: V3Config) -> Iterator[Floats]:
    """Of `kv_b_proj`, whose rows are, for each head, those that make keys, then those that make values."""
    keys, values = config.qk_nope_head_dim, config.v_head_dim
    for start in range(0, config.num_attention_heads * (keys + values), keys + values):
        if target.part == "keys":
            yield np.ascontiguousarray(weights.rows(source, start, start + keys).T)
        else:
            yield weights.rows(source, start + keys, start + keys + values)
