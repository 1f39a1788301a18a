"""Turns the Q4_1 weights of a GGUF into Q4_0, which llama.cpp computes faster on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import shelf
from deepseek_api_compat.models.progress import Progress

_FILE_TYPE_Q4_0 = 2  # ggml's LLAMA_FTYPE_MOSTLY_Q4_0


def package() -> Any:
    """The `gguf` package. Raises ModelError, which says how to install it."""
    try:
        import gguf
    except ImportError:
        raise ModelError(
            "Preparing the default model needs the embedded engine's packages; "
            "install them with: pip install 'deepseek-api-compat[embedded]'."
        ) from None
    return gguf


def to_q4_0(source: Path, target: Path, progress: Progress) -> None:
    """Write `target`: all metadata and tensors of `source`, its Q4_1 tensors as Q4_0.

    Tensors go through memory one at a time.
    `target` appears only when it is complete.
    """
    gguf = package()
    part = target.with_name(target.name + shelf.PART)
    with shelf.on_disk(target.parent):
        try:
            reader = gguf.GGUFReader(source)
            writer = gguf.GGUFWriter(part, reader.fields["general.architecture"].contents())
            _copy_metadata(gguf, reader, writer)
            _write_tensors(gguf, reader, writer, progress)
            shelf.publish(part, target)
        finally:
            part.unlink(missing_ok=True)


def _copy_metadata(gguf: Any, reader: Any, writer: Any) -> None:
    for field in reader.fields.values():
        if field.name == "general.architecture" or field.name.startswith("GGUF."):
            continue  # the writer makes these itself
        value = _FILE_TYPE_Q4_0 if field.name == "general.file_type" else field.contents()
        is_array = field.types[0] == gguf.GGUFValueType.ARRAY
        writer.add_key_value(field.name, value, field.types[0], field.types[-1] if is_array else None)


def _write_tensors(gguf: Any, reader: Any, writer: Any, progress: Progress) -> None:
    q4_0, q4_1 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q4_1
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.tensor_type == q4_1:
            shape = gguf.quant_shape_to_byte_shape(tuple(reversed(tensor.shape.tolist())), q4_0)
            size = shape[-1] * (data.size // data.shape[-1])
            writer.add_tensor_info(tensor.name, shape, data.dtype, size, q4_0)
        else:
            writer.add_tensor_info(tensor.name, data.shape, data.dtype, data.nbytes, tensor.tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with progress.bar("Preparing the model", sum(int(t.n_bytes) for t in reader.tensors)) as bar:
            for tensor in reader.tensors:
                data = tensor.data
                if tensor.tensor_type == q4_1:
                    data = gguf.quants.quantize(gguf.quants.dequantize(data, q4_1), q4_0)
                writer.write_tensor_data(data)
                bar.add(int(tensor.n_bytes))
    finally:
        writer.close()
