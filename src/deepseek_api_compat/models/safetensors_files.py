"""Reads and writes weights in safetensors files, with numpy alone.

Format: https://github.com/huggingface/safetensors. Eight bytes that give the length of a JSON header, the
header (names, types, shapes and places of tensors), the data. A model of several files has an index,
`model.safetensors.index.json`, which says what is where.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fp8
from deepseek_api_compat.models.fp8 import Floats
from deepseek_api_compat.models.v3_config import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SCALE = "_scale_inv"  # what the name of an FP8 weight's scales ends with
_LONGEST_HEADER = 100_000_000  # as the reference implementation has it
# Types that weights come in. BF16 and FP8 have no numpy type: they are read as bits.
_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1"}


class _Place(msgspec.Struct, frozen=True):
    """One tensor in a file's header. data_offsets: first byte, and last byte + 1, counted in the data."""

    dtype: str
    shape: Shape
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class Stored(NamedTuple):
    """A tensor to write: its type (a key of `_TYPES`) and its data."""

    dtype: str
    data: npt.NDArray[Any]


class _Found(NamedTuple):
    """A tensor in a file. offset: of its first byte, from the beginning of the file."""

    path: Path
    dtype: str
    shape: Shape
    offset: int

    def map(self) -> npt.NDArray[Any]:
        """Its data, mapped for as long as the array lives: mapped pages count as this process's memory."""
        return np.memmap(self.path, _TYPES[self.dtype], "r", self.offset, self.shape)


class Weights:
    """The weights of a folder. Nothing is held in memory: each piece is read when it is asked for."""

    def __init__(self, folder: Path, block: tuple[int, int] = (128, 128)) -> None:
        """block: of FP8 weights. Raises ModelError if there are no weights, or files that can't be read."""
        self._block = block
        self._tensors: dict[str, _Found] = {}
        for path, names in _files(folder).items():
            found = _scan(path)
            if missing := [name for name in names if name not in found]:
                raise ModelError(f"{path} lacks {_some(missing)}, which {INDEX} says it holds.")
            self._tensors.update(found)

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def check(self, expected: Mapping[str, Shape]) -> None:
        """Raises ModelError unless all are there, with these shapes and, where they are FP8, with scales."""
        if missing := [name for name in expected if name not in self]:
            raise ModelError(f"The checkpoint lacks {_some(missing)}.")
        for name, shape in expected.items():
            if self._tensors[name].shape != shape:
                raise ModelError(f"{name} is {self._tensors[name].shape} and should be {shape}.")
            if self._tensors[name].dtype == "F8_E4M3":
                self._check_scales(name)

    def _check_scales(self, name: str) -> None:
        rows, columns = self._tensors[name].shape
        shape = fp8.blocks(rows, self._block[0]), fp8.blocks(columns, self._block[1])
        scales = self._tensors.get(name + SCALE)
        if scales is None:
            raise ModelError(f"The checkpoint lacks {name}{SCALE}, the scales of an FP8 weight.")
        if (scales.dtype, scales.shape) != ("F32", shape):
            raise ModelError(f"{name}{SCALE} is {scales.dtype} {scales.shape} and should be F32 {shape}.")

    def read(self, name: str) -> Floats:
        """The whole tensor, as float32."""
        return self.rows(name, 0, self._tensors[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> Floats:
        """Those rows of the tensor, as float32. FP8 rows can start anywhere."""
        found = self._tensors[name]
        if found.dtype == "F8_E4M3":
            return self._dequantised(name, start, stop)
        part = found.map()[start:stop]
        if found.dtype == "BF16":
            return (part.astype(np.uint32) << 16).view(np.float32)
        return part.astype(np.float32)

    def _dequantised(self, name: str, start: int, stop: int) -> Floats:
        high = self._block[0]
        first = start // high  # whole rows of blocks, so that the scales fit
        codes = self._tensors[name].map()[first * high : stop]
        scales = self._tensors[name + SCALE].map()[first : fp8.blocks(stop, high)]
        return fp8.dequantise(codes, scales.astype(np.float32), self._block)[start - first * high :]


def _files(folder: Path) -> dict[Path, list[str]]:
    """The files of the model, and what the index says is in each (nothing, where there is no index)."""
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return {folder / SINGLE: []}
        raise ModelError(f"{folder} has neither {INDEX} nor {SINGLE}.")
    try:
        index = msgspec.json.decode((folder / INDEX).read_bytes(), type=_Index)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ModelError(f"Can't make sense of {folder / INDEX}: {error}.") from None
    files: dict[Path, list[str]] = {}
    for name, file in index.weight_map.items():
        if Path(file).name != file:
            raise ModelError(f"{folder / INDEX} names {file!r}, which is not in its own folder.")
        files.setdefault(folder / file, []).append(name)
    if absent := [path.name for path in files if not path.is_file()]:
        raise ModelError(f"{folder} lacks {_some(absent)}, which {INDEX} names.")
    return files


def _scan(path: Path) -> dict[str, _Found]:
    """What the file holds. Only its header is read."""
    try:
        data = np.memmap(path, np.uint8, "r")
        (length,) = struct.unpack("<Q", data[:8].tobytes())
        if length > min(len(data) - 8, _LONGEST_HEADER):
            raise ModelError(f"{path} is not a whole safetensors file: its header is cut short.")
        header = msgspec.json.decode(data[8 : 8 + length].tobytes(), type=dict[str, msgspec.Raw])
        places = {
            name: msgspec.json.decode(raw, type=_Place)
            for name, raw in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, struct.error, msgspec.MsgspecError) as error:
        raise ModelError(f"{path} is not a readable safetensors file: {error}.") from None
    start = 8 + length
    return {name: _found(path, name, place, start, len(data)) for name, place in places.items()}


def _found(path: Path, name: str, place: _Place, data: int, end: int) -> _Found:
    """data: where the file's data begins. end: of the file."""
    if place.dtype not in _TYPES:
        raise ModelError(f"{name} in {path} is {place.dtype}; known are {', '.join(_TYPES)}.")
    start, stop = (data + offset for offset in place.data_offsets)
    bytes_ = math.prod(place.shape) * np.dtype(_TYPES[place.dtype]).itemsize
    if not data <= start <= stop <= end or stop - start != bytes_:
        raise ModelError(f"{path} is damaged or cut short: the data of {name} is not all there.")
    return _Found(path, place.dtype, place.shape, start)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def write(folder: Path, tensors: Iterable[tuple[str, Stored]], shard_bytes: int) -> None:
    """Write the tensors to files of at most about that size, in their order, and their index.

    No more than one file's tensors are in memory.
    """
    shards: list[list[str]] = []
    total = 0
    for batch in _batches(tensors, shard_bytes):
        shards.append(list(batch))
        total += sum(stored.data.nbytes for stored in batch.values())
        _write_file(folder / f"{len(shards)}.part", batch)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"  # their number is known only now
        (folder / f"{number}.part").replace(folder / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _batches(tensors: Iterable[tuple[str, Stored]], limit: int) -> Iterator[dict[str, Stored]]:
    batch: dict[str, Stored] = {}
    size = 0
    for name, stored in tensors:
        if batch and size + stored.data.nbytes > limit:
            yield batch
            batch, size = {}, 0
        batch[name] = stored
        size += stored.data.nbytes
    yield batch


def _write_file(path: Path, tensors: Mapping[str, Stored]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": data.shape, "data_offsets": (at, at + data.nbytes)}
        at += data.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for stored in tensors.values():
            file.write(np.ascontiguousarray(stored.data).data)


def bfloat16(values: Floats) -> Stored:
    """As BF16. Only for values that BF16 holds exactly: nothing is rounded."""
    return Stored("BF16", (values.view(np.uint32) >> 16).astype(np.uint16))
