"""From pieces of text and where they stand in a picture to lines that read as the picture does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

CELLS = " | "  # between pieces of a line that stand apart, as cells of a table do
APART = 0.8  # of a line's height: a wider gap than between words
SAME_LINE = 0.5  # of the lower of two pieces' heights: so much overlap makes them one line


class Piece(NamedTuple):
    """A piece of text and its box, in pixels from the top left."""

    text: str
    left: float
    top: float
    right: float
    bottom: float


def lines(pieces: Iterable[Piece]) -> str:
    """The pieces as lines of text, from top to bottom and from left to right."""
    return "\n".join(map(_line, _rows(pieces)))


def _rows(pieces: Iterable[Piece]) -> list[list[Piece]]:
    rows: list[list[Piece]] = []
    for piece in sorted(pieces, key=lambda piece: piece.top + piece.bottom):
        # Beside the row's last piece, not any: what stands a little askew stays one line.
        if rows and _overlap(rows[-1][-1], piece) >= SAME_LINE:
            rows[-1].append(piece)
        else:
            rows.append([piece])
    return rows


def _overlap(one: Piece, other: Piece) -> float:
    shared = min(one.bottom, other.bottom) - max(one.top, other.top)
    return shared / max(1.0, min(one.bottom - one.top, other.bottom - other.top))


def _line(row: list[Piece]) -> str:
    row = sorted(row, key=lambda piece: piece.left)
    text = row[0].text
    for before, piece in pairwise(row):
        height = min(before.bottom - before.top, piece.bottom - piece.top)
        text += (CELLS if piece.left - before.right > APART * height else " ") + piece.text
    return text
