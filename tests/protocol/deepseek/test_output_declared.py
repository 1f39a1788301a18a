"""Outputs that are not as they should be have declared results, the same at any split."""

from __future__ import annotations

from typing import Any

import pytest

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.deepseek.output_dsml import NEWLINES
from deepseek_api_compat.protocol.deepseek.output_reader import HOLD_LIMIT
from deepseek_api_compat.protocol.deepseek.segments import EOS
from deepseek_api_compat.protocol.events import Finish, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece, TokenLogprob
from protocol.deepseek.answers import add_up, events_of, in_order, parser_of

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
V31 = f"{CALL}look{SEP}"
V3 = f"{CALL}function{SEP}look\n```json\n"
BLOCK, BLOCK_END = "<｜DSML｜tool_calls>\n", "</｜DSML｜tool_calls>"
LOOK, LOOK_END = '<｜DSML｜invoke name="look">\n', "</｜DSML｜invoke>\n"
KEY, KEY_END = '<｜DSML｜parameter name="k" string="true">', "</｜DSML｜parameter>\n"
JSON, UNTYPED = '<｜DSML｜parameter name="k" string="false">', '<｜DSML｜parameter name="k">'
ONE = f"{LOOK}{KEY}v{KEY_END}{LOOK_END}"

# Text, and the arguments of each call of `look`.
Result = tuple[str, list[str]]


def read(
    format: str, text: str, start: str = "content", finish: str = "stop", tools: bool = True
) -> dict[str, Any]:
    """The message, the same at every two-way split and one character at a time."""
    whole = events_of(parser_of(format, start, tools), [text], finish)
    assert in_order(events_of(parser_of(format, start, tools), text, finish)) == in_order(whole)
    for at in range(1, len(text), 1 + len(text) // 300):
        events = events_of(parser_of(format, start, tools), [text[:at], text[at:]], finish)
        assert in_order(events) == in_order(whole), at
    return add_up(whole)


def answer(text: str, calls: list[str], finish: str, reasoning: str = "") -> dict[str, Any]:
    return {
        "content": text,
        "reasoning_content": reasoning,
        "tool_calls": [{"name": "look", "arguments": arguments} for arguments in calls],
        "finish_reason": finish,
    }


# Calls that count, in the formats with markers.

MARKERS: dict[str, tuple[str, str, Result]] = {
    "the end of the block ends an open call": ("v3.1", f"a{CALLS}{V31}1{CALLS_END}", ("a", ["1"])),
    "a block lacks its end": ("v3.1", f"a{CALLS}{V31}1{CALL_END}\n", ("a", ["1"])),
    "white space in a block": (
        "v3.1", f"{CALLS}\n {V31}1{CALL_END}\n\n{V31}2{CALL_END} {CALLS_END}", ("", ["1", "2"])),
    "no call after a call": ("v3.1", f"{CALLS}{V31}1{CALL_END} and {V31}2", (f" and {V31}2", ["1"])),
    "a block in a block": ("v3.1", f"{CALLS}{V31}1{CALL_END}\n{CALLS}{V31}2{CALL_END}", ("", ["1", "2"])),
    "text after calls": ("v3.1", f"a{CALLS}{V31}1{CALL_END}{CALLS_END}\n\nb\n", ("a\n\nb\n", ["1"])),
    "a marker before a block": ("v3.1", f"{CALLS}{CALLS}{V31}1{CALL_END}{CALLS_END}", (CALLS, ["1"])),
    "a name in white space": ("v3.1", f"{CALLS}{CALL}\nlook {SEP}1{CALL_END}", ("", ["1"])),
    "invalid JSON": ("v3.1", f"{CALLS}{V31}{{k: '1',}}{CALL_END}", ("", ["{k: '1',}"])),
    "no arguments": ("v3.1", f"{CALLS}{V31}{CALL_END}{V31}{CALL_END}", ("", ["{}", "{}"])),
    "a string without its end, then a call": (
        "v3.1", f'{CALLS}{V31}{{"a": "b}}{CALL_END}{V31}2{CALL_END}{CALLS_END}c', ("c", ['{"a": "b}', "2"])),
    "a string without its end, then a newline and a call": (
        "v3", f'{CALLS}{V3}{{"a": "b}}\n```{CALL_END}\n{V3}2\n```{CALL_END}', ("", ['{"a": "b}', "2"])),
    "a string without its end, then the end": (
        "v3", f'{CALLS}{V3}{{"a": "b}}\n```{CALL_END}{EOS}', ("", ['{"a": "b}'])),
    "markers in a string": (
        "v3", f'{CALLS}{V3}["```{CALL_END} {CALL_END}\\"{CALLS_END}"]\n```{CALL_END}',
        ("", [f'["```{CALL_END} {CALL_END}\\"{CALLS_END}"]'])),
    "a backslash at the end of a string": ("v3.1", f'{CALLS}{V31}["\\\\"]{CALL_END}', ("", ['["\\\\"]'])),
    "other ways to end a fence": (
        "v3", f"{CALLS}{V3}1\n```\n{CALL_END}{V3}2```{CALL_END}{V3}3{CALL_END}\n{V3}4\n```{CALLS_END}",
        ("", ["1", "2", "3", "4"])),
    "EOS in the middle": ("v3.1", f"a{EOS}b{CALLS}{V31}1{EOS}{CALL_END}", (f"a{EOS}b", [f"1{EOS}"])),
}  # fmt: skip

# Calls that count, in DSML tags.

TAGS: dict[str, tuple[str, str, Result]] = {
    "the end of the block ends an open call": (
        "v4", f"{BLOCK}{LOOK}{KEY}v{KEY_END}{BLOCK_END}", ("", ['{"k": "v"}'])),
    "the end of the block ends other arguments": ("v4", f"{BLOCK}{LOOK}1\n{BLOCK_END}", ("", ["1"])),
    "the end of the call ends a parameter": ("v4", f"{BLOCK}{LOOK}{KEY}v{LOOK_END}", ("", ['{"k": "v"}'])),
    "a block lacks its beginning": ("v4", f"a\n\n{ONE}", ("a", ['{"k": "v"}'])),
    "a block lacks its end": ("v4", f"a\n\n{BLOCK}{ONE}", ("a", ['{"k": "v"}'])),
    "another format's tags": (
        "v4.1", f"a\n\n<｜DSML｜function_calls>{ONE}</｜DSML｜ calls>", ("a", ['{"k": "v"}'])),
    "no call after a call": ("v4", f"{BLOCK}{ONE}and {KEY}", (f"\nand {KEY}", ['{"k": "v"}'])),
    "text after calls": ("v4", f"a\n\n{BLOCK}{ONE}{BLOCK_END}\n\nb\n", ("a\n\nb\n", ['{"k": "v"}'])),
    "a second block": (
        "v4", f"{BLOCK}{ONE}{BLOCK_END}\n\n{BLOCK}{ONE}{BLOCK_END}", ("", ['{"k": "v"}', '{"k": "v"}'])),
    "a block in a block": (
        "v4", f"{BLOCK}{ONE}{BLOCK}{ONE}{BLOCK_END}", ("", ['{"k": "v"}', '{"k": "v"}'])),
    "a tag that is none before a call": (
        "v4", f"a\n\n<｜DSML｜ calls> b\n\n{BLOCK}{ONE}", ("a\n\n<｜DSML｜ calls> b", ['{"k": "v"}'])),
    "newlines before a block in V3.2": ("v3.2", f"a\n\n\n{BLOCK}{ONE}", ("a\n", ['{"k": "v"}'])),
    "many newlines before a block in V4": (
        "v4", "a" + "\n" * (NEWLINES + 1) + BLOCK + ONE, ("a\n", ['{"k": "v"}'])),
    "a call ends in its own tag": ("v4", f'{BLOCK}<｜DSML｜invoke name="look" />{BLOCK_END}', ("", ["{}"])),
    "no parameters": ("v4", f"{BLOCK}{LOOK}{LOOK_END}{BLOCK_END}", ("", ["{}"])),
    "JSON instead of parameters": (
        "v4", f'{BLOCK}{LOOK}{{"a": "<b>"}}\n{LOOK_END}{BLOCK_END}', ("", ['{"a": "<b>"}'])),
    "text instead of parameters": ("v4", f"{BLOCK}{LOOK}<k>v</k>{LOOK_END}{BLOCK_END}", ("", ["<k>v</k>"])),
    "text after parameters": (
        "v4", f"{BLOCK}{LOOK}{KEY}v{KEY_END}and{LOOK_END}{BLOCK_END}", ("", ['{"k": "v"and'])),
    "a parameter's tag that is none": (
        "v4", f'{BLOCK}{LOOK}<｜DSML｜parameter name="k" a="b">v{KEY_END}{LOOK_END}',
        ("", ['<｜DSML｜parameter name="k" a="b">v</｜DSML｜parameter>'])),
    "too much white space before a parameter": (
        "v4", f"{BLOCK}{LOOK}{' ' * (HOLD_LIMIT - 1)}{KEY}v{LOOK_END}", ("", [f"{KEY}v"])),
    "a parameter's name is too long": (
        "v4", f'{BLOCK}{LOOK}<｜DSML｜parameter name="{"k" * HOLD_LIMIT}">v{LOOK_END}',
        ("", [f'<｜DSML｜parameter name="{"k" * HOLD_LIMIT}">v'])),
    "the same parameter again": (
        "v4", f"{BLOCK}{LOOK}{KEY}a{KEY_END}{KEY}b{KEY_END}{LOOK_END}", ("", ['{"k": "a", "k": "b"}'])),
    "invalid JSON": ("v4", f"{BLOCK}{LOOK}{JSON}{{a{KEY_END}{LOOK_END}", ("", ['{"k": {a}'])),
    "no type, JSON": ("v4", f"{BLOCK}{LOOK}{UNTYPED} [null]{KEY_END}{LOOK_END}", ("", ['{"k":  [null]}'])),
    "no type, text": ("v4", f'{BLOCK}{LOOK}{UNTYPED}true"{KEY_END}{LOOK_END}', ("", ['{"k": "true\\""}'])),
    "no type, nothing": ("v4", f"{BLOCK}{LOOK}{UNTYPED}{KEY_END}{LOOK_END}", ("", ['{"k": ""}'])),
    "no type, no JSON": ("v4", f"{BLOCK}{LOOK}{UNTYPED}[NaN]{KEY_END}{LOOK_END}", ("", ['{"k": "[NaN]"}'])),
    "no type, long JSON": (
        "v4", f"{BLOCK}{LOOK}{UNTYPED}[{'1,' * HOLD_LIMIT}2]{KEY_END}{LOOK_END}",
        ("", [f'{{"k": [{"1," * HOLD_LIMIT}2]}}'])),
    "no type, long number": (
        "v4", f"{BLOCK}{LOOK}{UNTYPED}{'1' * (HOLD_LIMIT + 1)}{KEY_END}{LOOK_END}",
        ("", [f'{{"k": "{"1" * (HOLD_LIMIT + 1)}"}}'])),
    "no type, a number as long as can be": (
        "v4", f"{BLOCK}{LOOK}{UNTYPED}{'1' * HOLD_LIMIT}{KEY_END}{LOOK_END}",
        ("", [f'{{"k": {"1" * HOLD_LIMIT}}}'])),
    "quotes in a parameter's name": (
        "v4", f'{BLOCK}{LOOK}<｜DSML｜parameter name="a\\b">1{KEY_END}{LOOK_END}', ("", ['{"a\\\\b": 1}'])),
}  # fmt: skip

CALLED = {f"markers: {name}": case for name, case in MARKERS.items()} | {
    f"tags: {name}": case for name, case in TAGS.items()
}


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_calls_that_count(name: str, finish: str) -> None:
    format, text, (content, calls) = CALLED[name]
    reason = "tool_calls" if finish == "stop" else "length"
    assert read(format, text, finish=finish) == answer(content, calls, reason)


# Calls that don't.

OPEN: dict[str, tuple[str, str, str]] = {
    "in arguments": ("v3.1", f'{CALLS}{V31}{{"a": "b', '{"a": "b'),
    "in an escape": ("v3.1", f'{CALLS}{V31}{{"a": "b\\', '{"a": "b\\'),
    "in an end marker": ("v3", f"{CALLS}{V3}{{}}\n```<｜tool▁ca", "{}"),
    "in what may be an end marker": ("v3", f"{CALLS}{V3}{{}}\n```<", "{}\n```<"),
    "in what may be an end marker in a string": ("v3.1", f'{CALLS}{V31}["<｜tool▁ca', '["<｜tool▁ca'),
    "in an end marker, with EOS": ("v3", f"{CALLS}{V3}{{}}\n```<｜tool▁ca{EOS}", "{}"),
    "after the header": ("v3.1", f"{CALLS}{V31}", ""),
    "after a call's tag": ("v4", f"{BLOCK}{LOOK}", ""),
    "in a parameter's tag": ("v4", f"{BLOCK}{LOOK}{KEY[:-9]}", ""),
    "in a string": ("v4", f"{BLOCK}{LOOK}{KEY}a <", '{"k": "a <'),
    "in a string's end tag": ("v4", f"{BLOCK}{LOOK}{KEY}a</｜DSML｜para", '{"k": "a'),
    "after a string": ("v4", f"{BLOCK}{LOOK}{KEY}a{KEY_END}", '{"k": "a"'),
    "in a call's end tag": ("v4", f"{BLOCK}{LOOK}{KEY}a{KEY_END}</", '{"k": "a"'),
    "in JSON": ("v4", f"{BLOCK}{LOOK}{JSON}[1, ", '{"k": [1, '),
    "in JSON's end tag": ("v4", f"{BLOCK}{LOOK}{JSON}1</｜DSML｜", '{"k": 1'),
    "in a value without a type": ("v4", f"{BLOCK}{LOOK}{UNTYPED}true", '{"k": true'),
    "in the end tag of a value without a type": ("v4", f"{BLOCK}{LOOK}{UNTYPED}tru</｜", '{"k": "tru'),
    "in JSON instead of parameters": ("v4", f'{BLOCK}{LOOK}{{"a": 1}}\n</｜DSML｜inv', '{"a": 1}\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_call_that_the_output_s_end_cuts_stays_as_streamed(name: str, finish: str) -> None:
    format, text, arguments = OPEN[name]
    assert read(format, f"a{text}", finish=finish) == answer("a", [arguments], finish)


NO_CALLS = {
    "a marker": ("v3.1", f"a{CALLS}b"),
    "a marker at the end": ("v3", f"a{CALLS}"),
    "half a marker at the end": ("v3", f"a{CALLS[:-1]}"),
    "a marker and a newline at the end": ("v3.1", f"a{CALLS}\n"),
    "half a header at the end": ("v3", f"a{CALLS}{V3[:-1]}"),
    "a header without a fence": ("v3", f"{CALLS}{V3[:-8]}{{}}{CALL_END}{CALLS_END}"),
    "a header without a name": ("v3.1", f"{CALLS}{CALL} {SEP}{{}}{CALL_END}{CALLS_END}"),
    "a header that is too long": ("v3.1", f"{CALLS}{CALL}{'x' * HOLD_LIMIT}{SEP}{{}}{CALL_END}{CALLS_END}"),
    "a call without a block": ("v3.1", f"{V31}{{}}{CALL_END}"),
    "the end of a block": ("v3.1", f"a{CALLS_END}b"),
    "half an EOS token": ("v3.1", f"a{EOS[:-1]}"),
    "a think tag": ("v3.1", "<think>a</think>b"),
    "a tag": ("v4", f"a\n\n{BLOCK}b"),
    "a tag at the end": ("v4", f"a\n\n{BLOCK}"),
    "half a tag at the end": ("v4", f"a\n\n{BLOCK[:-4]}"),
    "half a call's tag at the end": ("v4", f"a\n\n{BLOCK}{LOOK[:-3]}"),
    "a call's tag without a name": ("v4", f'{BLOCK}<｜DSML｜invoke name=" ">\n{KEY}v{KEY_END}{LOOK_END}'),
    "a call's tag with other attributes": ("v4", f'{BLOCK}<｜DSML｜invoke name="look" a="b">\n{LOOK_END}'),
    "a call's tag that is too long": ("v4", f'{BLOCK}<｜DSML｜invoke name="{"x" * HOLD_LIMIT}">\n{LOOK_END}'),
    "a parameter without a call": ("v4", f"a\n\n{BLOCK}{KEY}v{KEY_END}{BLOCK_END}"),
    "end tags": ("v4", f"a\n\n{LOOK_END}{BLOCK_END}b"),
    "tags that there are not": ("v4", "see <｜DSML｜foo> and <｜DSML｜tool_call>"),
    "think tags in V3.2": ("v3.2", "<think>a</think>b"),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_CALLS)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_what_never_became_a_call_is_text_verbatim(name: str, finish: str) -> None:
    format, text = NO_CALLS[name]
    assert read(format, text, finish=finish) == answer(text, [], finish)
    assert read(format, text + EOS, finish=finish) == answer(text, [], finish)


@pytest.mark.parametrize("format", output.FORMATS)
def test_without_declared_tools_calls_are_text(format: str) -> None:
    text = f"a\n\n{BLOCK}{ONE}{BLOCK_END}{CALLS}{V3}{{}}\n```{CALL_END}{CALLS_END}"
    assert read(format, text, tools=False) == answer(text, [], "stop")


@pytest.mark.parametrize(
    ("format", "text", "wanted"),
    [
        ("v3.1", f"a{CALLS}\n{CALLS_END}b", "ab"),
        ("v4", f"a\n\n{BLOCK}{BLOCK_END}b", "ab"),
        ("v3", f"a{EOS}{EOS}", f"a{EOS}"),
        ("v4", "\n\na</think>\n", "a\n"),
        ("v3.2", "\n\na\n", "\n\na\n"),
    ],
)
def test_framing_and_blocks_without_calls_are_left_out(format: str, text: str, wanted: str) -> None:
    assert read(format, text) == answer(wanted, [], "stop")


# Reasoning.


@pytest.mark.parametrize(
    ("format", "start", "text", "reasoning", "content"),
    [
        ("r1", "reasoning", "never closed\n", "never closed\n", ""),
        ("r1", "reasoning", "half closed</thin", "half closed</thin", ""),
        ("r1", "reasoning", "a</think>b</think>c", "a", "b</think>c"),
        ("r1", "reasoning", "a<think>b</think>c", "a<think>b", "c"),
        ("r1", "reasoning", "<think>\na</think>b", "a", "b"),
        ("r1", "reasoning", "<think", "<think", ""),
        ("r1", "reasoning_continuation", "<think>a</think>b", "<think>a", "b"),
        ("r1", "either", "<think>\na</think>b", "a", "b"),
        ("r1", "either", "<think>", "", ""),
        ("r1", "either", "<thin", "", "<thin"),
        ("r1", "either", " <think>a</think>b", "", " <think>a</think>b"),
        ("r1", "either", "a</think>b", "", "a</think>b"),
        ("v3.1", "either", f"<think>a{EOS}", "a", ""),
        ("v3.2", "reasoning", "\n\na\n</think>\n\nb", "\n\na\n", "\n\nb"),
        ("v3.2", "reasoning", f"a\n\n{BLOCK}b</think>c", f"a\n\n{BLOCK}b", "c"),
        ("v4", "either", "\n\na", "", "a"),
        ("v4", "either", "<think>\n\na\n</think>\nb", "a", "b"),
        ("v4", "reasoning", "\n\na\n\n</think>\n\nb</think>c", "a", "bc"),
        ("v4", "reasoning", "a\n\n", "a\n\n", ""),
        ("v4", "reasoning", "a" + "\n" * (NEWLINES + 1) + "</think>b", "a\n", "b"),
        ("v4", "reasoning", f"see {BLOCK[:-1]} or {LOOK}</think>b", f"see {BLOCK[:-1]} or {LOOK[:-1]}", "b"),
        ("v4", "reasoning_continuation", "\na</think>\nb", "\na", "b"),
        ("v4", "content_continuation", "\n<think>", "", "\n<think>"),
    ],
)
@pytest.mark.parametrize("tools", [True, False])
def test_reasoning(format: str, start: str, text: str, reasoning: str, content: str, tools: bool) -> None:
    assert read(format, text, start, tools=tools) == answer(content, [], "stop", reasoning)


@pytest.mark.parametrize("format", ["v3.2", "v4", "v4.1"])
def test_a_call_ends_reasoning_that_is_not_closed(format: str) -> None:
    text = f"a\n\n{BLOCK}{ONE}{BLOCK_END}b"
    assert read(format, text, "reasoning") == answer("b", ['{"k": "v"}'], "tool_calls", "a")


def test_in_the_other_formats_reasoning_has_no_calls() -> None:
    text = f"a{CALLS}{V31}{{}}{CALL_END}{CALLS_END}"
    assert read("v3.1", text, "reasoning") == answer("", [], "stop", text)


@pytest.mark.parametrize(
    ("format", "text"),
    [
        ("v3", f"{V3}{{}}\n```{CALL_END}{CALLS_END}"),
        ("v3.1", f"\n{V31}{{}}{CALL_END}"),
        ("v4", f"{LOOK}{LOOK_END}{BLOCK_END}"),
        ("v4.1", '<｜DSML｜ invoke name="look"/>'),
    ],
)
def test_the_prompt_may_have_opened_the_block(format: str, text: str) -> None:
    assert read(format, text, "tool_calls") == answer("", ["{}"], "tool_calls")


@pytest.mark.parametrize("format", output.FORMATS)
def test_an_opened_block_may_have_no_call(format: str) -> None:
    assert read(format, "no", "tool_calls") == answer("no", [], "stop")


# As it streams.


def test_thinking_says_what_comes_next() -> None:
    seen = []
    parser = parser_of("v4", "either")
    for text in ("<thi", "nk>", "hm", "\n</think>", "yes"):
        parser.feed(Piece(text=text))
        seen.append(parser.thinking)
    assert seen == [False, True, True, False, False]
    assert parser_of("r1", "reasoning").thinking
    assert parser_of("v3.1", "reasoning_continuation").thinking
    parser = parser_of("v4", "reasoning")
    parser.feed(Piece(text=f"{BLOCK}{LOOK}"))
    assert not parser.thinking


def test_arguments_stream_as_they_are_written() -> None:
    parser = parser_of("v3")
    assert parser.feed(Piece(text=CALLS + V3)) == [ToolCall(0, 0, "call_0", "look")]
    told = [parser.feed(Piece(text=text)) for text in ("{", '"a":', "1}", "\n", "``", f"`{CALL_END}")]
    assert told == [[ToolCall(0, 0, arguments=text)] for text in ("{", '"a":', "1}")] + [[], [], []]
    assert parser.feed(Piece(finish="stop")) == [Finish(0, "tool_calls")]


def test_half_a_character_keeps_its_logprobs() -> None:
    parser, half = parser_of("v3.1"), TokenLogprob("\ufffd", -0.5, [0xF0, 0x9F])
    assert parser.feed(Piece([1], "", [half])) == [Text(0, "", [half])]


def test_parameters_stream_as_they_are_written() -> None:
    parser = parser_of("v4.1")
    told = [
        parser.feed(Piece(text=text)) for text in (f"\n\n{BLOCK}", LOOK, KEY, 'a "', "b", "<", "c", KEY_END)
    ]
    assert told[0] == []
    assert told[1] == [ToolCall(0, 0, "call_0", "look")]
    parts = ['{"k": "', 'a \\"', "b", "", "<c", '"']
    assert told[2:] == [[ToolCall(0, 0, arguments=part)] if part else [] for part in parts]
    assert parser.feed(Piece(text=LOOK_END, finish="stop")) == [
        ToolCall(0, 0, arguments="}"),
        Finish(0, "tool_calls"),
    ]


def test_text_without_a_type_streams_once_it_is_clear() -> None:
    parser = parser_of("v4")
    parser.feed(Piece(text=f"{BLOCK}{LOOK}{UNTYPED}"))
    assert parser.feed(Piece(text="har")) == [
        ToolCall(0, 0, arguments='{"k": "'),
        ToolCall(0, 0, arguments="har"),
    ]
    assert parser.feed(Piece(text="bour")) == [ToolCall(0, 0, arguments="bour")]


def test_nothing_comes_after_the_end() -> None:
    parser = output.parser("v3.1", start="content", tools_declared=True, tools=[], index=3)
    assert parser.feed(Piece(finish="stop")) == [Finish(3, "stop")]
    assert parser.feed(Piece(text="more", finish="length")) == []
    assert parser.close() == []


def test_an_answer_that_just_ends_is_a_fault() -> None:
    with pytest.raises(EngineFailed, match="without saying why"):
        parser_of("r1", "reasoning").close()


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="not 'v9'"):
        parser_of("v9")
    with pytest.raises(ValueError, match="not 'middle'"):
        parser_of("v3.1", "middle")
