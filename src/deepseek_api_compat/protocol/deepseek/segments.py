"""DeepSeek's control tokens, and prompts written with them."""

from __future__ import annotations

import re

from deepseek_api_compat.protocol.segment import Segment

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


def given(text: str) -> Segment:
    """Text from a request: never a control token."""
    return Segment(text, False)


def written(text: str) -> list[Segment]:
    """Text of our own, in which the spelling of a control token means that token."""
    pieces = enumerate(_CONTROL.split(text))
    return [Segment(piece, special=bool(i % 2)) for i, piece in pieces if piece]
