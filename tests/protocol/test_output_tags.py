"""The generic form: reasoning between think tags, calls as JSON between call tags, at any split."""

import json
import time
from collections.abc import Iterable
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece, TokenLogprob
from deepseek_api_compat.protocol.output import Parser
from deepseek_api_compat.protocol.output_tags import HOLD_LIMIT, STARTS, TagParser

NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": [1, 2]}}\n</tool_call>'
OSLO = ("weather", '{"city": "Oslo", "days": [1, 2]}')


def events_of(
    chunks: Iterable[str], start: str = "content", tools_declared: bool = True, finish: str = "stop"
) -> list[Event]:
    ids = count()
    parser = TagParser(start=start, tools_declared=tools_declared, new_id=lambda: f"call_{next(ids)}")
    events = [event for chunk in chunks for event in parser.feed(Piece(text=chunk))]
    return events + parser.feed(Piece(finish=finish)) + parser.close()


def add_up(events: list[Event]) -> dict[str, Any]:
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, ToolCall):
            if event.call_index == len(calls):
                assert event.id == f"call_{event.call_index}"
                assert event.name
                calls.append((event.name, ""))
            else:
                assert event.call_index == len(calls) - 1
                assert event.id is None
                assert event.name is None
            calls[-1] = (calls[-1][0], calls[-1][1] + event.arguments)
    assert [isinstance(event, Finish) for event in events].index(True) == len(events) - 1
    return {
        "text": "".join(event.text for event in events if isinstance(event, Text)),
        "reasoning": "".join(event.text for event in events if isinstance(event, Reasoning)),
        "calls": calls,
        "finish": events[-1].reason if isinstance(events[-1], Finish) else None,
    }


def read(
    output: str, start: str = "content", tools_declared: bool = True, finish: str = "stop"
) -> dict[str, Any]:
    """The answer, the same at every two-way split and one character at a time."""
    whole = add_up(events_of([output], start, tools_declared, finish))
    assert add_up(events_of(output, start, tools_declared, finish)) == whole
    for at in range(1, len(output)):
        assert add_up(events_of([output[:at], output[at:]], start, tools_declared, finish)) == whole, at
    return whole


def answer(
    text: str = "", calls: list[tuple[str, str]] | None = None, finish: str = "stop", reasoning: str = ""
) -> dict[str, Any]:
    return {"text": text, "reasoning": reasoning, "calls": calls or [], "finish": finish}


# Reasoning.


@pytest.mark.parametrize(
    ("start", "output", "reasoning", "text"),
    [
        ("reasoning", "hm\n</think>\n\nyes\n", "hm", "yes\n"),
        ("reasoning", "\nhm</think>yes", "hm", "yes"),
        ("reasoning", "<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("reasoning", "\n<think>hm</think>yes", "hm", "yes"),
        ("reasoning", "\n\n a\n\n</think>\n\n\nyes", "\n a\n", "\nyes"),
        ("reasoning", " <thin", " <thin", ""),
        ("reasoning", "hm\n</thi", "hm\n</thi", ""),
        ("reasoning", "\n</think>\n", "", ""),
        ("reasoning", "a <think> b </think> c </think>", "a <think> b ", " c </think>"),
        ("reasoning", f"{NOW}</think>yes", NOW, "yes"),
        ("either", "<think>\n\n</think>\n\nyes", "", "yes"),
        ("either", " \n<think>hm</think>yes", "hm", "yes"),
        ("either", "<think>hm", "hm", ""),
        ("either", "\n yes <think>no</think>", "", "\n yes <think>no</think>"),
        ("either", " <think", "", " <think"),
        ("either", "", "", ""),
        ("content", "<think>no</think>", "", "<think>no</think>"),
        ("content_continuation", "\n<think>", "", "\n<think>"),
        ("reasoning_continuation", "\n<think>on\n</think>\n\nyes", "\n<think>on", "yes"),
    ],
)
@pytest.mark.parametrize("tools_declared", [True, False])
def test_reasoning(start: str, output: str, reasoning: str, text: str, tools_declared: bool) -> None:
    assert read(output, start, tools_declared) == answer(text, reasoning=reasoning)


def test_thinking_says_what_comes_next() -> None:
    parser: Parser = TagParser(start="either", tools_declared=True)
    seen = []
    for text in ("\n", "<think>", "hm", "</think>", "yes"):
        parser.feed(Piece(text=text))
        seen.append(parser.thinking)
    assert seen == [False, True, True, False, False]
    assert TagParser(start="reasoning", tools_declared=False).thinking
    assert not TagParser(start="content", tools_declared=False).thinking


def test_reasoning_then_calls() -> None:
    output = f"<think>\nOslo?\n</think>\n\n{WEATHER}"
    assert read(output, "either") == answer("", [OSLO], "tool_calls", "Oslo?")


# Calls as they should be, or nearly.


@pytest.mark.parametrize(
    ("output", "text", "calls"),
    [
        (NOW, "", [("now", "{}")]),
        (f"Let me look.\n{WEATHER}", "Let me look.", [OSLO]),
        (f"Let me look.\n\n{WEATHER}\n", "Let me look.\n", [OSLO]),
        (f"Let me look. {WEATHER}", "Let me look. ", [OSLO]),
        (f" \n\n{WEATHER}\n{NOW}\n\n", "", [OSLO, ("now", "{}")]),
        (f"{WEATHER}{NOW}{NOW}", "", [OSLO, ("now", "{}"), ("now", "{}")]),
        (f"a{NOW}\n\nb\n{NOW}c ", "a\n\nb" + "c ", [("now", "{}"), ("now", "{}")]),
    ],
)
def test_text_and_calls(output: str, text: str, calls: list[tuple[str, str]]) -> None:
    assert read(output) == answer(text, calls, "tool_calls")


@pytest.mark.parametrize(
    ("inside", "arguments"),
    [
        ('{"name":"f","arguments":{"a":1}}', '{"a":1}'),
        (' \n{ "name" : "f" ,\n"arguments"\n:\n{ "a" : 1 } } \n', '{ "a" : 1 }'),
        ('{"arguments": {"a": {"name": "g"}}, "name": "f"}', '{"a": {"name": "g"}}'),
        ('{"name": "f", "parameters": {"a": 1}}', '{"a": 1}'),
        ('{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 1}, "name": "g"}', '{"a": 1}'),
        ('{"id": [1, {"x": "}"}], "n": -1.5e3, "name": "f", "arguments": {}, "x": "\\""}', "{}"),
        ('{"name": "f"}', "{}"),
        ('{"name": "f", "arguments": null}', "{}"),
        ('{"arguments": null, "name": "f"}', "{}"),
        ('{"name": "f", "arguments": ""}', "{}"),
        ('{"name": "f", "arguments": [1, "]"]}', '[1, "]"]'),
        ('{"name": "f", "arguments": 12}', "12"),
        ('{"name": "f", "arguments": "{\\"a\\": \\"\\\\n\\u00e9\\ud83d\\ude00\\/\\"}"}', '{"a": "\\né😀/"}'),
        ('{"arguments": "{\\"a\\": 1}", "name": "f"}', '{"a": 1}'),
        ('{"name": "f", "arguments": "line\nline"}', "line\nline"),
        ('{"name": "f", "arguments": "\\ud83d \\ude00 \\q \\u12"}', "\ufffd \ufffd \\q \\u12"),
        ('{"na\\u006de": " \\u0066 ", "arguments": {}}', "{}"),
        ('{"name": "f", "arguments": {"a": "</tool_call> \\"\\\\"}}', '{"a": "</tool_call> \\"\\\\"}'),
        ('{"name": "f", "arguments": {"a": "<tool_call>"}}', '{"a": "<tool_call>"}'),
        ('{"name": "f", "arguments": {"a": "\u2028é😀\u05d0"}}', '{"a": "\u2028é😀\u05d0"}'),
        ('{"name": "f", "arguments": {"a": 1},}', '{"a": 1}'),
        # Braces that are missing, and surplus ones.
        ('{"name": "f", "arguments": {"a": 1}\n', '{"a": 1}'),
        ('{"name": "f"', "{}"),
        ('{"name": "f", "arguments": {"a": {"b": 1}', '{"a": {"b": 1}'),
        ('{"name": "f", "arguments": {"a": 1}}}\n}', '{"a": 1}'),
        # JSON that is wrong.
        ('{"name": "f", "arguments": {a: 1, "b": tru, < 3}}', "{a: 1, \"b\": tru, < 3}"),
        ('{"name": "f", "arguments": {"a": [1}}', '{"a": [1}}'),
    ],
)  # fmt: skip
def test_ways_to_write_a_call(inside: str, arguments: str) -> None:
    assert read(f"<tool_call>{inside}</tool_call>") == answer("", [("f", arguments)], "tool_calls")


def test_without_declared_tools_a_call_is_text() -> None:
    assert read(WEATHER, tools_declared=False) == answer(WEATHER)


def test_a_continued_answer_may_call() -> None:
    assert read(f" so:\n{NOW}", "content_continuation") == answer(" so:", [("now", "{}")], "tool_calls")


# What is no call.


@pytest.mark.parametrize(
    "output",
    [
        "the <tool_call> tag",
        "<tool_call>",
        "x\n<tool_call>\n",
        "\n\n<tool_call>\n\n{",
        "x\n<tool_ca",
        "</tool_call>",
        '<tool_call>{"name": "f"',
        '<tool_call>{"name": "f"}\n</tool_',
        '<tool_call>{"name": "f", "arguments": 12',
        '<tool_call>{"name": "f", "arguments": }</tool_call>',
        '<tool_call>{"name": "f" "arguments": {}}</tool_call>',
        '<tool_call>{"name": "f" is a call}</tool_call>',
        '<tool_call>{"name": "f"} text</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": " ", "arguments": {}}</tool_call>',
        '<tool_call>{"name": 1, "arguments": {}}</tool_call>',
        '<tool_call>{"name": ["f"], "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"name": "f"}}</tool_call>',
        '<tool_call>{"arguments": {"a": 1</tool_call>',
        "<tool_call>{'name': 'f'}</tool_call>",
        "<tool_call>{}</tool_call>",
        "<tool_call>{,}</tool_call>",
        '<tool_call>[{"name": "f"}]</tool_call>',
        '<tool_call>{"na\nme": "f"}</tool_call>',
        '<tool_call>{"name": "f\\',
        '<tool_call>{"name": "f\\u00',
        '{"name": "f", "arguments": {}}',
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_what_is_no_call_is_text_verbatim(output: str, finish: str) -> None:
    assert read(output, finish=finish) == answer(output, finish=finish)


def test_text_that_is_no_call_does_not_hide_the_next_call() -> None:
    call = [("now", "{}")]
    assert read(f"<tool_call>{NOW}") == answer("<tool_call>", call, "tool_calls")
    assert read(f"Use <tool_call>: {NOW}") == answer("Use <tool_call>: ", call, "tool_calls")
    lost_quote = '<tool_call>\n{"name": "f, "arguments": {}}\n</tool_call>'
    assert read(f"{lost_quote}\n{NOW}") == answer(lost_quote, call, "tool_calls")


# Calls that never end.


@pytest.mark.parametrize(
    ("output", "arguments", "text"),
    [
        ('<tool_call>{"name": "f", "arguments": {"a": "b', '{"a": "b', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": "b\\', '{"a": "b\\', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}', '{"a": 1}', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}', '{"a": 1}', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": 1}}\n</tool_ca', '{"a": 1}', ""),
        ('<tool_call>{"name": "f", "arguments": {"a": </tool_', '{"a": </tool_', ""),
        ('<tool_call>{"name": "f", "arguments": "{\\"a\\": \\"\\ud83', '{"a": "\\ud83', ""),
        ('<tool_call>{"name": "f", "arguments": {}}\nDone.', "{}", "\nDone."),
        ('<tool_call>{"name": "f", "arguments": {}} <tool', "{}", " <tool"),
        ('<tool_call>{"name": "f", "arguments": {}, oops}</tool_call>', "{}", ", oops}</tool_call>"),
        ('<tool_call>{"name": "f", "arguments": {} "x"', "{}", ' "x"'),
    ],
)
def test_a_call_that_never_ends_stays_as_streamed(output: str, arguments: str, text: str) -> None:
    assert read(output) == answer(text, [("f", arguments)])
    assert read(output, finish="length") == answer(text, [("f", arguments)], "length")


def test_a_call_after_one_that_never_ends() -> None:
    output = f'<tool_call>\n{{"name": "f", "arguments": {{}}}}\n{NOW}'
    assert read(output) == answer("", [("f", "{}"), ("now", "{}")], "tool_calls")


def test_the_engine_s_limit_stays_the_reason() -> None:
    assert read(NOW, finish="length") == answer("", [("now", "{}")], "length")


# Streaming.


def test_arguments_stream_as_they_are_written() -> None:
    parser = TagParser(start="content", tools_declared=True, new_id=lambda: "call_1")
    texts = [
        '<tool_call>\n{"name": "f", ',
        '"arguments": ',
        '{"ci',
        'ty": "Os',
        "lo",
        '"}',
        "}\n</tool_call>",
    ]
    told = [parser.feed(Piece(text=text)) for text in texts]
    assert told[:2] == [[], []]
    assert told[2] == [ToolCall(0, 0, "call_1", "f"), ToolCall(0, 0, arguments='{"ci')]
    assert told[3:] == [[ToolCall(0, 0, arguments=text)] for text in ('ty": "Os', "lo", '"}')] + [[]]


def test_the_end_may_come_with_the_last_text() -> None:
    parser = TagParser(start="content", tools_declared=True, index=3)
    assert parser.feed(Piece(text="yes\n<tool", finish="stop")) == [Text(3, "yes\n<tool"), Finish(3, "stop")]
    assert parser.feed(Piece(text="more", finish="length")) == []
    assert parser.close() == []


def test_an_answer_that_just_ends_is_a_fault() -> None:
    parser = TagParser(start="content", tools_declared=True)
    parser.feed(Piece(text=WEATHER))
    with pytest.raises(EngineFailed, match="without saying why"):
        parser.close()


def test_ids_differ() -> None:
    events = TagParser(start="content", tools_declared=True).feed(Piece(text=NOW + NOW))
    assert len({event.id for event in events if isinstance(event, ToolCall) and event.id}) == 2


def test_what_start_may_be_is_named() -> None:
    with pytest.raises(ValueError, match="not 'middle'"):
        TagParser(start="middle", tools_declared=True)


def token(text: str) -> TokenLogprob:
    return TokenLogprob(text, -1.0, list(text.encode()))


def told_logprobs(texts: list[str], start: str) -> list[tuple[str, list[str]]]:
    """Each text of the answer with the tokens that came with it."""
    parser = TagParser(start=start, tools_declared=True)
    events = [event for text in texts for event in parser.feed(Piece([1], text, [token(text)]))]
    events += parser.feed(Piece([2], "", [token("")], finish="stop"))
    return [
        (event.text, [found.token for found in event.logprobs or ()])
        for event in events
        if isinstance(event, Text)
    ]


def test_logprobs_are_those_of_the_text() -> None:
    texts = [
        "<think>",
        "hm",
        "</think>",
        "\n\n",
        "a",
        " <",
        "b",
        ".\n",
        '<tool_call>{"name":',
        '"f"}',
        "</tool_call>",
    ]
    assert told_logprobs(texts, "either") == [("a", ["a"]), (" ", []), ("<b", [" <", "b"]), (".", [])]
    assert told_logprobs(["a\n", "<"], "content") == [("a", []), ("\n<", ["a\n", "<", ""])]


def test_half_a_character_keeps_its_logprobs() -> None:
    parser = TagParser(start="content", tools_declared=True)
    half = TokenLogprob("\ufffd", -0.5, [0xF0, 0x9F])
    parser.feed(Piece([1], "a"))
    assert parser.feed(Piece([1], "", [half])) == [Text(0, "", [half])]


# Any output at any split.

PARTS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "{", "}", "[", "]", ":", ",", '"', "\\",
    "<", "a", '{"name": "f", ', '"arguments": ', '"arguments": {"a": 1}', "null", "12", '\\"', "\\ud83d",
    "\\ude00", "\\u00e9", NOW, WEATHER, "text", "é😀",
)  # fmt: skip


def is_subsequence(part: str, whole: str) -> bool:
    left = iter(whole)
    return all(character in left for character in part)


@given(st.data())
def test_any_output_is_the_same_at_any_split(data: st.DataObject) -> None:
    output = "".join(data.draw(st.lists(st.sampled_from(PARTS), max_size=25)))
    start, tools = data.draw(st.sampled_from(STARTS)), data.draw(st.booleans())
    finish = data.draw(st.sampled_from(["stop", "length"]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(output)), max_size=9)))
    chunks = [output[i:j] for i, j in zip([0, *cuts], [*cuts, len(output)], strict=True)]
    whole = add_up(events_of([output], start, tools, finish))
    assert add_up(events_of(chunks, start, tools, finish)) == whole
    assert add_up(events_of(output, start, tools, finish)) == whole
    assert is_subsequence(whole["text"], output)
    assert is_subsequence(whole["reasoning"], output)
    if whole["finish"] == "tool_calls":
        assert "</tool_call>" in output
        assert finish == "stop"
    assert len(whole["calls"]) <= (output.count("<tool_call>") if tools else 0)


@given(st.lists(st.sampled_from([part for part in PARTS if "name" not in part]), max_size=25), st.booleans())
def test_nothing_is_lost_and_nothing_invented_without_a_name(parts: list[str], tools: bool) -> None:
    output = "".join(parts)
    assert add_up(events_of(output, tools_declared=tools)) == answer(output)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda value: st.lists(value, max_size=3) | st.dictionaries(st.text(), value, max_size=3),
    max_leaves=8,
)


@given(st.data())
def test_what_a_model_means_is_what_is_read(data: st.DataObject) -> None:
    """Text, calls with any arguments in each way to write them, in random pieces."""
    text = data.draw(
        st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])).filter(
            lambda t: t == t.strip()
        )
    )
    wanted = data.draw(st.lists(st.dictionaries(st.text(), JSON, max_size=4), max_size=3))
    output = text
    for arguments in wanted:
        written = json.dumps(arguments, ensure_ascii=data.draw(st.booleans()))
        value = json.dumps(written) if data.draw(st.booleans()) else written
        members = data.draw(st.permutations(['"name": "f"', f'"arguments": {value}', '"id": 7']))
        output += "\n<tool_call>\n{" + ", ".join(members) + "}\n</tool_call>"
    size = data.draw(st.integers(1, 40))
    got = add_up(events_of([output[at : at + size] for at in range(0, len(output), size)]))
    assert got["text"] == text
    assert [json.loads(arguments) for _, arguments in got["calls"]] == wanted
    assert got["finish"] == ("tool_calls" if wanted else "stop")


# Bounds.


@pytest.mark.parametrize(
    "begun",
    [
        '<tool_call>{"' + "x" * HOLD_LIMIT,
        '<tool_call>{"arguments": {"a": "' + "x" * HOLD_LIMIT,
        '<tool_call>{"arguments": "' + "\\n" * (HOLD_LIMIT // 2),
        '<tool_call>{"x": ' + "1" * HOLD_LIMIT,
        "<tool_call>" + " " * HOLD_LIMIT,
        '<tool_call>{"name": "f"' + "}" * HOLD_LIMIT,
        " " * HOLD_LIMIT,
        NOW + " " * HOLD_LIMIT,
    ],
)
def test_no_more_than_the_limit_is_held(begun: str) -> None:
    output = begun + f" and more.\n{NOW}"
    whole = add_up(events_of([output]))
    calls = [("now", "{}")] * output.count(NOW)
    assert whole == answer(output.replace(f"\n{NOW}", "").replace(NOW, ""), calls, "tool_calls")
    pieces = [output[at : at + 1000] for at in range(0, len(output), 1000)]
    assert add_up(events_of(pieces)) == whole
    parser, told = TagParser(start="content", tools_declared=True), 0
    for number, piece in enumerate(pieces, 1):
        told += sum(len(event.text) for event in parser.feed(Piece(text=piece)) if isinstance(event, Text))
        assert number * 1000 - told <= HOLD_LIMIT + 1000 + len(NOW)


LONG = {
    "text": "one word and\n" * 80_000,
    "arguments": '<tool_call>{"name":"f","arguments":{"a":"' + "x y " * 250_000,
    "nesting": '<tool_call>{"name":"f","arguments":' + "[" * 1_000_000,
    "escapes": '<tool_call>{"name":"f","arguments":"' + '\\"a\\n' * 200_000,
    "no calls": '<tool_call>{"na" ' * 60_000,
    "long no calls": '<tool_call>{"' * 80_000,
    "unended calls": '<tool_call>{"name":"f","arguments":{}}' * 15_000,
    "half tags": "<tool_cal" * 110_000,
    "white space": " \n" * 500_000,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_takes_linear_time(kind: str) -> None:
    """In one piece, whose cost would show anything quadratic."""
    started = time.perf_counter()
    events = TagParser(start="content", tools_declared=True).feed(Piece(text=LONG[kind], finish="length"))
    assert time.perf_counter() - started < 10
    assert events[-1] == Finish(0, "length")


@pytest.mark.parametrize("kind", LONG)
def test_many_pieces_are_parsed_in_linear_time(kind: str) -> None:
    """Under 10 us each on an idle core; the bound is for a busy one."""
    pieces = [Piece(text=LONG[kind][at : at + 4]) for at in range(0, 40_000, 4)]
    best = 60.0
    for _ in range(3):
        parser = TagParser(start="content", tools_declared=True)
        started = time.perf_counter()
        for piece in pieces:
            parser.feed(piece)
        best = min(best, time.perf_counter() - started)
    assert best / len(pieces) < 1e-3
