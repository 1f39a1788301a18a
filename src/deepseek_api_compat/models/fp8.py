"""Weights in FP8, as DeepSeek publishes them: e4m3 numbers, and one scale for each block of 128 x 128.

A weight is its number times the scale of its block (`weight_scale_inv`, which divided the weight before it
was rounded). e4m3 here is the finite kind (FN): no infinities, largest 448, NaN where all bits but the sign
are 1.
Source: arXiv 2209.05433, section 3, and README_WEIGHTS.md of DeepSeek-V3.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

LARGEST = 448.0


def _value(byte: int) -> float:
    """sign, 4 bits of exponent (bias 7), 3 of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = byte >> 7, byte >> 3 & 15, byte & 7
    if exponent == 15 and mantissa == 7:
        return float("nan")
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


VALUES: Floats = np.array([_value(byte) for byte in range(256)], np.float32)


def blocks(length: int, block: int) -> int:
    """How many blocks cover that length; the last one may be cut."""
    return -(-length // block)


def dequantise(codes: Bytes, scales: Floats, block: tuple[int, int]) -> Floats:
    """The weights of a matrix. codes: (rows, columns); scales: (blocks of rows, blocks of columns)."""
    weights = VALUES[codes]
    weights *= _spread(scales, codes.shape, block)
    return weights


def quantise(weights: Floats, block: tuple[int, int]) -> tuple[Bytes, Floats]:
    """Codes and scales of a matrix: a block's largest weight becomes 448, the others the nearest code."""
    rows, columns = weights.shape
    high, wide = blocks(rows, block[0]), blocks(columns, block[1])
    padded = np.zeros((high * block[0], wide * block[1]), np.float32)
    padded[:rows, :columns] = np.abs(weights)
    largest = padded.reshape(high, block[0], wide, block[1]).max(axis=(1, 3))
    scales = np.where(largest > 0, largest / np.float32(LARGEST), np.float32(1)).astype(np.float32)
    return _nearest(weights / _spread(scales, weights.shape, block)), scales


def _spread(scales: Floats, shape: tuple[int, ...], block: tuple[int, int]) -> Floats:
    """Each weight's scale."""
    tall = np.repeat(scales, block[0], axis=0)[: shape[0]]
    return np.repeat(tall, block[1], axis=1)[:, : shape[1]]


def _nearest(values: Floats) -> Bytes:
    """The codes nearest to the values, ties to the even mantissa. Values are within +-448."""
    sizes = VALUES[:127]  # ascending; their indices are the codes of positive numbers
    middles = (sizes[1:] + sizes[:-1]) / 2  # exact in float32
    magnitudes = np.abs(values)
    below, above = np.searchsorted(middles, magnitudes, "left"), np.searchsorted(middles, magnitudes, "right")
    codes = np.where(below % 2 == 0, below, above).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(128), codes)
