"""A megabyte in one piece takes linear time, whatever it is made of."""

from __future__ import annotations

import time

import pytest

from deepseek_api_compat.protocol.events import Finish
from deepseek_api_compat.protocol.job import Piece
from protocol.deepseek.answers import parser_of

CALLS = "<｜tool▁calls▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
V31 = "<｜tool▁call▁begin｜>look<｜tool▁sep｜>"
V3 = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n```json\n"
BLOCK, LOOK, LOOK_END = "<｜DSML｜tool_calls>\n", '<｜DSML｜invoke name="look">\n', "</｜DSML｜invoke>\n"
KEY, KEY_END = '<｜DSML｜parameter name="k" string="true">', "</｜DSML｜parameter>\n"
UNTYPED = '<｜DSML｜parameter name="k">'

LONG = {
    "text": ("", "one word and\n"),
    "newlines": ("", "\n"),
    "half markers": ("", "<"),
    "markers": ("", CALLS),
    "headers without an end": ("", CALLS + V31[:-2]),
    "headers of white space": ("", CALLS + " " * 400),
    "calls": (CALLS, f"{V31}{{}}{CALL_END}"),
    "calls with text between": ("", f"{CALLS}{V31}{{}}{CALL_END}x"),
    "end markers in a string": (f'{CALLS}{V31}["', CALL_END),
    "strings": (f"{CALLS}{V31}[", '"",'),
    "escapes": (f'{CALLS}{V31}["', "\\n"),
    "half fences": (CALLS + V3, "\n```"),
    "tags": ("", BLOCK),
    "tags without an end": ("", BLOCK + LOOK[:-3]),
    "tags in white space": ("", LOOK[:-2] + " " * 300),
    "stray think tags": ("", "</think>" + LOOK[:-3]),
    "calls in tags": (BLOCK, f"{LOOK}{KEY}v{KEY_END}{LOOK_END}"),
    "calls in tags with text between": (BLOCK, f"{LOOK}{LOOK_END} x"),
    "parameters": (BLOCK + LOOK, f"{KEY}v{KEY_END}"),
    "parameters that never end": (BLOCK + LOOK, KEY),
    "values without a type": (BLOCK + LOOK, f"{UNTYPED}7{KEY_END}"),
    "a value without a type": (BLOCK + LOOK + UNTYPED, "["),
    "a value of half tags": (BLOCK + LOOK + KEY, "</｜DSML｜"),
    "other arguments": (BLOCK + LOOK + "{", "\n"),
}


@pytest.mark.parametrize("format", ["r1", "v3.1", "v4"])
@pytest.mark.parametrize("start", ["content", "reasoning"])
def test_a_megabyte_takes_linear_time(format: str, start: str) -> None:
    for kind, (first, again) in LONG.items():
        text = first + again * (1_000_000 // len(again))
        began = time.thread_time()
        events = parser_of(format, start).feed(Piece(text=text, finish="length"))
        assert time.thread_time() - began < 10, kind
        assert events[-1] == Finish(0, "length")
