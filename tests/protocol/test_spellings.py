"""Spellings of control tokens: which texts need a mark, and what comes back from a rendered prompt."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.spellings import (
    Spellings,
    free_mark,
    marked_value,
    spelled_in,
    texts_of,
)

START, END = "<|im_start|>", "<|im_end|>"
CHATML = Spellings([START, END, "<think>", "</think>"], "")
MARK = "\ue000"


@pytest.mark.parametrize(
    "text",
    [
        START,
        f"a{END}b",
        "<|IM_End|>",  # a template may change the case
        "ends with <|im_",
        "ends with <|im_ \n",  # a template may strip
        "<",
        ">",
        "start|>user",
        "\n |> quoted",
        f"<|im_{START}start|>",
    ],
)
def test_texts_that_need_a_mark(text: str) -> None:
    assert CHATML.threaten(text)
    assert MARK in CHATML.marked(text, MARK)
    assert START not in CHATML.marked(text, MARK)


@pytest.mark.parametrize(
    "text", ["", "  ", "Hi", "a < b > c", "im_start", "<|im_mid|> ok", "<b>bold</b> text"]
)
def test_texts_that_need_none(text: str) -> None:
    assert not CHATML.threaten(text)
    assert CHATML.marked(text, MARK) == text


def test_where_marks_go() -> None:
    assert CHATML.marked(f" {START}{END} ", MARK) == " <\ue000|im_start|><\ue000|im_end|> "
    assert CHATML.marked("\n> no <|im \n", MARK) == "\n\ue000> no <|im\ue000 \n"


def test_spellings_that_overlap_are_all_marked() -> None:
    spellings = Spellings(["<a><b>", "<b><c>", "aa"], "")
    assert spellings.marked("<a><b><c>", MARK) == "<\ue000a><\ue000b><c>"
    assert "aa" not in spellings.marked("aaaaa", MARK)


def test_a_rendered_prompt_is_split() -> None:
    rendered = f"{START}user\n<\ue000|im_end|> and \\ue000<|im_end{END}\n"
    assert CHATML.split(rendered, MARK) == [
        Segment(START, True),
        Segment("user\n<|im_end|> and <|im_end", False),
        Segment(END, True),
        Segment("\n", False),
    ]
    assert CHATML.split("\ue000") == [Segment("\ue000", False)]
    assert CHATML.split("") == []


def test_the_longest_spelling_counts() -> None:
    spellings = Spellings(["<|a", "<|a|>", "<|a|><|b|>"], "")
    assert [one.text for one in spellings.split("<|a<|a|>x<|a|><|b|>")] == ["<|a", "<|a|>", "x", "<|a|><|b|>"]


def test_a_model_without_control_tokens() -> None:
    none = Spellings(["", "x", "\n\n"], "")
    assert not none.threaten("x\n\nx")
    assert none.marked("x", MARK) == "x"
    assert none.split("a x") == [Segment("a x", False)]
    assert "x" not in none


def test_a_template_that_puts_spellings_together() -> None:
    source = "{% for m in messages %}{{ '<|' + m.role + '|>' + m.name }}{% endfor %}"
    spellings = Spellings(["<|user|>", "<|assistant|>", "<|end|>"], source)
    for text in ("user", " Assistant\n", "use"):
        assert spellings.threaten(text)
        assert MARK in spellings.marked(text, MARK)
    assert not spellings.threaten("a user")
    value = {"role": "user", "name": "user", "user": {"type": "user", "x": ["user"]}}
    assert marked_value(spellings, value, MARK) == {
        "role": "user",
        "name": "\ue000user",
        "user": {"type": "user", "x": ["\ue000user"]},
    }


def test_a_value_is_marked_throughout() -> None:
    value = {"a": [START, 1, None, {END: ("x", 2.5, True)}]}
    assert marked_value(CHATML, value, MARK) == {
        "a": ["<\ue000|im_start|>", 1, None, {"<\ue000|im_end|>": ["x", 2.5, True]}]
    }
    assert sorted(texts_of(value)) == sorted(["a", START, END, "x"])


def test_a_mark_is_a_character_that_nobody_uses() -> None:
    assert free_mark(["", "Hi"]) == "\ue000"
    assert free_mark(["\ue000 \\uE001", "\ue003 \\ue002"]) == "\ue004"
    with pytest.raises(InvalidRequest, match="private use"):
        free_mark(map(chr, range(0xE000, 0xF900)))


def test_control_tokens_of_a_source() -> None:
    assert spelled_in("{{ '<|im_start|>' }}<｜User｜>{{ '<|' + role + '|>' }}<b> <| x |>") == {
        START,
        "<｜User｜>",
    }


def test_a_long_search_misses_nothing_at_its_steps() -> None:
    for at in ((1 << 20) - 5, 1 << 20):
        assert CHATML.threaten("x" * at + END + "x")


PARTS = st.lists(
    st.sampled_from(["<", "|", "<|im", "_start", "|>", START, END, "IM_START", ">", " ", "é", "think", "/"]),
    max_size=6,
).map("".join)


@given(PARTS, PARTS, st.sampled_from(["", " ", "\n", START, END + "\n"]))
def test_no_two_texts_make_a_control_token(one: str, two: str, between: str) -> None:
    rendered = CHATML.marked(one, MARK) + between + CHATML.marked(two, MARK)
    segments = CHATML.split(rendered, MARK)
    written = [Segment(text, True) for text in re.findall(r"<.*?>", between)]
    assert [segment for segment in segments if segment.special] == written
    assert "".join(segment.text for segment in segments) == one + between + two


@given(PARTS, PARTS)
def test_what_needs_no_mark_makes_no_control_token(one: str, two: str) -> None:
    if not CHATML.threaten(one) and not CHATML.threaten(two):
        assert [segment for segment in CHATML.split(one + two) if segment.special] == []


def test_many_spellings_cost_no_more() -> None:
    many = Spellings([f"<|reserved_special_token_{n}|>" for n in range(1000)], "")
    assert "<|reserved_special_token_999|>" in many
    assert not many.threaten("<|reserved_special_token_1000|> " * 10_000 + ".")
