from __future__ import annotations

import numpy as np
import pytest

from deepseek_api_compat.models import fp8

BLOCK = (128, 128)


@pytest.mark.parametrize(
    ("code", "value"),
    [
        (0b0_0000_000, 0.0),
        (0b0_0000_001, 2.0**-9),  # the smallest
        (0b0_0000_111, 7 * 2.0**-9),  # the largest subnormal
        (0b0_0001_000, 2.0**-6),
        (0b0_0111_000, 1.0),
        (0b0_0111_001, 1.125),
        (0b1_1000_100, -3.0),
        (0b0_1111_110, 448.0),
        (0b1_1111_110, -448.0),
    ],
)
def test_values_of_codes(code: int, value: float) -> None:
    assert fp8.VALUES[code] == value


def test_two_codes_are_no_number() -> None:
    assert np.flatnonzero(np.isnan(fp8.VALUES)).tolist() == [0x7F, 0xFF]


def test_every_code_comes_back() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8).reshape(2, 127)
    ones = np.ones((1, 1), np.float32)
    weights = fp8.dequantise(codes, ones, BLOCK)
    again, scales = fp8.quantise(weights, BLOCK)
    assert scales.tolist() == [[1.0]]  # 448 is among them
    assert again.tolist() == codes.tolist()


def test_halfway_goes_to_the_even_mantissa() -> None:
    weights = np.array([[448, 1.0625, 1.1875, 1.06, 1.07, -1.0625]], np.float32)
    codes, _ = fp8.quantise(weights, BLOCK)
    assert fp8.VALUES[codes].tolist() == [[448, 1.0, 1.25, 1.0, 1.125, -1.0]]


def test_each_block_has_its_scale_and_the_last_ones_are_cut() -> None:
    random = np.random.default_rng(3)
    weights = random.normal(size=(200, 300)).astype(np.float32)
    weights[:128, :128] *= 1000
    weights[128:, 256:] = 0
    codes, scales = fp8.quantise(weights, BLOCK)
    assert scales.shape == (2, 3)
    assert scales[0, 0] > 500 * scales[0, 1]
    back = fp8.dequantise(codes, scales, BLOCK)
    assert not back[128:, 256:].any()
    # 3 bits of mantissa: at most half a step of 1/8; below the normal numbers a step of 2^-9 of the scale.
    spread = np.repeat(np.repeat(scales, 128, axis=0), 128, axis=1)[:200, :300]
    assert (np.abs(back - weights) <= np.maximum(np.abs(weights) / 16, spread * 2.0**-10) * 1.0001).all()
