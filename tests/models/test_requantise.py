from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import requantise
from deepseek_api_compat.models.gguf import inspect
from fakes.screen import Screen

Q = gguf.GGMLQuantizationType


def test_q4_1_becomes_q4_0_and_the_rest_stays(
    tiny_gguf: Path, weights: np.ndarray, tmp_path: Path, screen: Screen
) -> None:
    target = tmp_path / "out.gguf"
    requantise.to_q4_0(tiny_gguf, target, screen)

    assert inspect(target).file_type == 2
    before, after = gguf.GGUFReader(tiny_gguf), gguf.GGUFReader(target)
    matrix, norm = after.tensors
    assert (matrix.name, matrix.tensor_type, list(matrix.shape)) == ("blk.0.weight", Q.Q4_0, [64, 4])
    assert np.abs(gguf.quants.dequantize(matrix.data, Q.Q4_0) - weights).max() < 0.4
    assert (norm.tensor_type, norm.data.tolist()) == (Q.F32, list(range(8)))
    assert {name: field.contents() for name, field in before.fields.items()} == {
        name: 3 if name == "general.file_type" else field.contents() for name, field in after.fields.items()
    }


def test_a_failure_leaves_nothing(tiny_gguf: Path, tmp_path: Path, screen: Screen) -> None:
    (tmp_path / "taken" / "x").mkdir(parents=True)  # a directory in the way of the last step
    with pytest.raises(ModelError, match="Can't write to the model cache"):
        requantise.to_q4_0(tiny_gguf, tmp_path / "taken", screen)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken", "tiny.gguf"]
