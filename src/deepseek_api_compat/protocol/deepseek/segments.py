"""A prompt as a list of segments: control tokens, and text between them.

Only what this package writes itself becomes a control token. Text from a request stays text, whatever it
spells, so that no message can close its own turn or open another's.
"""

from __future__ import annotations

import re
from typing import NamedTuple

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
THINK = "<think>"
THINK_END = "</think>"
CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEP = "<｜tool▁sep｜>"
OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"
FIM_BEGIN = "<｜fim▁begin｜>"
FIM_HOLE = "<｜fim▁hole｜>"
FIM_END = "<｜fim▁end｜>"

_CONTROL = re.compile(r"(<｜[^<>｜]+｜>|</?think>)")


class Segment(NamedTuple):
    """A piece of a prompt; `special` where it is one control token, spelled out."""

    text: str
    special: bool


def given(text: str) -> Segment:
    """Text from a request: never a control token."""
    return Segment(text, False)


def written(text: str) -> list[Segment]:
    """Text of our own, in which the spelling of a control token means that token."""
    pieces = enumerate(_CONTROL.split(text))
    return [Segment(piece, special=bool(i % 2)) for i, piece in pieces if piece]
