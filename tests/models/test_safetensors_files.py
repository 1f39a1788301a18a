from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import fp8, safetensors_files
from deepseek_api_compat.models.safetensors_files import INDEX, SCALE, Stored, Weights, bfloat16

F32 = np.arange(12, dtype=np.float32).reshape(4, 3) / 7
EXACT = np.array([[1.0, -0.5], [3.0, 2.0**-20]], np.float32)


def write(folder: Path, shard_bytes: int = 39_070) -> Path:
    """Two files, the second with the scales alone."""
    codes, scales = fp8.quantise(
        np.linspace(-1, 1, 300 * 130, dtype=np.float32).reshape(300, 130), (128, 128)
    )
    tensors = {
        "a": Stored("F32", F32),
        "b": bfloat16(EXACT),
        "c": Stored("F16", EXACT.astype(np.float16)),
        "d": Stored("F8_E4M3", codes),
        "d" + SCALE: Stored("F32", scales),
    }
    safetensors_files.write(folder, tensors.items(), shard_bytes)
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    weights = Weights(write(tmp_path))
    assert weights.read("a").tolist() == F32.tolist()
    assert weights.read("b").tolist() == EXACT.tolist()
    assert weights.read("c").tolist() == EXACT.astype(np.float16).astype(np.float32).tolist()
    assert np.abs(weights.read("d") - np.linspace(-1, 1, 39000).reshape(300, 130)).max() < 1 / 16
    assert "e" not in weights


@pytest.mark.parametrize(("start", "stop"), [(0, 1), (5, 120), (100, 140), (128, 256), (255, 300)])
def test_rows_of_fp8_can_start_anywhere(tmp_path: Path, start: int, stop: int) -> None:
    weights = Weights(write(tmp_path))
    assert weights.rows("d", start, stop).tolist() == weights.read("d")[start:stop].tolist()


def test_shards_and_their_index(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=60)
    index = json.loads((tmp_path / INDEX).read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
        INDEX,
    ]
    assert list(index["weight_map"].values()) == [
        "model-00001-of-00004.safetensors",
        "model-00001-of-00004.safetensors",
        "model-00002-of-00004.safetensors",
        "model-00003-of-00004.safetensors",
        "model-00004-of-00004.safetensors",
    ]
    assert index["metadata"]["total_size"] == 48 + 8 + 8 + 39000 + 3 * 2 * 4


def test_a_file_without_an_index(tmp_path: Path) -> None:
    write(tmp_path, shard_bytes=1_000_000)
    (tmp_path / "model-00001-of-00001.safetensors").rename(tmp_path / "model.safetensors")
    (tmp_path / INDEX).unlink()
    assert Weights(tmp_path).read("a").tolist() == F32.tolist()


def test_data_need_not_be_aligned(tmp_path: Path) -> None:
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    data = struct.pack("<Q", len(header)) + header + F32[0].tobytes()
    (tmp_path / "model.safetensors").write_bytes(data)
    assert Weights(tmp_path).read("x").tolist() == F32[0].tolist()


def test_check_names_what_is_wrong(tmp_path: Path) -> None:
    weights = Weights(write(tmp_path))
    weights.check({"a": (4, 3), "d": (300, 130)})
    with pytest.raises(ModelError, match=r"lacks e, f, g, h, i and 1 more"):
        weights.check({"a": (4, 3), **dict.fromkeys("efghij", (1,))})
    with pytest.raises(ModelError, match=r"a is \(4, 3\) and should be \(3, 4\)"):
        weights.check({"a": (3, 4)})


@pytest.mark.parametrize(
    ("scales", "reason"),
    [
        (None, "lacks w_scale_inv, the scales of an FP8 weight"),
        (
            Stored("F32", np.ones((1, 2), np.float32)),
            r"w_scale_inv is F32 \(1, 2\) and should be F32 \(2, 1\)",
        ),
        (Stored("F16", np.ones((2, 1), np.float16)), "w_scale_inv is F16"),
    ],
)
def test_fp8_without_its_scales(tmp_path: Path, scales: Stored | None, reason: str) -> None:
    tensors = {"w": Stored("F8_E4M3", np.zeros((130, 4), np.uint8))}
    if scales:
        tensors["w" + SCALE] = scales
    safetensors_files.write(tmp_path, tensors.items(), 1000)
    with pytest.raises(ModelError, match=reason):
        Weights(tmp_path).check({"w": (130, 4)})


def spoil(folder: Path, how: str) -> None:
    first = folder / "model-00001-of-00002.safetensors"
    data = first.read_bytes()
    index = folder / INDEX
    if how == "absent":
        first.unlink()
    elif how == "cut":
        first.write_bytes(data[:-1])
    elif how == "header":
        first.write_bytes(data[:20])
    elif how == "empty":
        first.write_bytes(b"")
    elif how == "type":
        first.write_bytes(data.replace(b'"F16"', b'"I16"'))
    elif how == "elsewhere":
        index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    elif how == "lacks":
        index.write_text(index.read_text().replace('"a"', '"z"'))
    elif how == "index":
        index.write_text("[]")
    else:
        index.unlink()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("absent", "lacks model-00001-of-00002.safetensors, which"),
        ("cut", "damaged or cut short: the data of d is not all there"),
        ("header", "not a whole safetensors file: its header is cut short"),
        ("empty", "is not a readable safetensors file"),
        ("type", "c in .* is I16; known are F32, F16, BF16, F8_E4M3"),
        ("elsewhere", "is not in its own folder"),
        ("lacks", "lacks z, which model.safetensors.index.json says it holds"),
        ("index", "Can't make sense of"),
        ("no index", "has neither model.safetensors.index.json nor model.safetensors"),
    ],
)
def test_files_that_can_not_be_read(tmp_path: Path, how: str, reason: str) -> None:
    write(tmp_path)
    spoil(tmp_path, how)
    with pytest.raises(ModelError, match=reason):
        Weights(tmp_path)
