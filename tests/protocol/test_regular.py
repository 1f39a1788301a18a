"""Regular expressions and their derivatives, beside Python's own."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.protocol.regular import (
    ANY_TEXT,
    EMPTY,
    NOTHING,
    Expr,
    Unreadable,
    any_of,
    literal,
    mapped,
    one_of,
    outside,
    repeat,
    sequence,
)
from deepseek_api_compat.protocol.regular_syntax import pattern, written_as

PATTERNS = [
    "",
    "a",
    "^a",
    "a$",
    "^a|b$",
    "^(a|b)*c{2,3}$",
    "^(?:a?){3}b$",
    "^a{2,}b?$",
    r"^[^\da-b\-]+\.\w?$",
    r"^\D\W\S?$",
    "(^ab|c)",
    "^(?P<x>a)(?<y>b)$",
    "^a+?b*?$",
    r"^[]a]|[a-]$",
    r"^\x61\u0062\t?$",
    "^((a|b)(c|))*$",
    "^.$",
    "^}]$",
]
TEXTS = st.text("abc1.-_]} \té\n", max_size=6)


def python_s(source: str) -> str:
    """The pattern as Python writes it, where digits and word characters are ASCII's and $ is the very end."""
    return re.sub(r"(?<!\\)\$", r"\\Z", source.replace("(?<", "(?P<"))


@pytest.mark.parametrize("source", PATTERNS)
@given(text=TEXTS)
def test_a_pattern_is_searched_for(source: str, text: str) -> None:
    assert pattern(source).matches(text) == bool(re.search(python_s(source), text, re.ASCII))


@pytest.mark.parametrize("source", PATTERNS)
@given(text=TEXTS, more=TEXTS)
def test_what_may_follow_a_text_is_written_again(source: str, text: str, more: str) -> None:
    rest = pattern(source)
    for character in text:
        rest = rest.after(character)
    assert rest.matches(more) == pattern(source).matches(text + more)
    if rest is not NOTHING:
        assert written_as(rest.written()) is rest


@pytest.mark.parametrize(
    "source",
    [
        "(?i)a",
        "(?=a)",
        "(?!a)",
        r"\p{L}",
        "[a[b]]",
        "[a&&b]",
        r"\bx",
        "a$b",
        "x^",
        "(a",
        "[a",
        "a++",
        "a{,3}",
        "*",
    ],
)
def test_what_is_not_read(source: str) -> None:
    with pytest.raises(Unreadable):
        pattern(source)


@pytest.mark.parametrize(
    ("expr", "written"),
    [
        (EMPTY, "(?:)"),
        (literal("a/é"), r"a\x{2f}\x{e9}"),
        (sequence(literal("a"), one_of([literal("b"), literal("c")])), "a(?:b|c)"),
        (repeat(literal("ab"), 1), "(?:ab)+"),
        (repeat(repeat(literal("a"), 2, 3)), "(?:a{2,3})*"),
        (repeat(literal("a"), 2, 2), "a{2}"),
        (any_of([(97, 99), (100, 101), (120, 120)]), "[a-ex]"),
    ],
)
def test_written(expr: Expr, written: str) -> None:
    assert expr.written() == written


def test_equal_expressions_are_one() -> None:
    assert written_as("(ab|cd)*x") is written_as("(?:cd|ab)*x")
    assert sequence(sequence(literal("a"), literal("b")), literal("c")) is literal("abc")
    assert one_of([literal("a"), NOTHING, literal("a")]) is literal("a")
    assert sequence(literal("a"), NOTHING) is NOTHING
    assert repeat(literal("a"), 0, 0) is EMPTY
    assert ANY_TEXT.after("x") is ANY_TEXT


def test_no_surrogate_is_a_character() -> None:
    assert outside(()) == ((0, 0xD7FF), (0xE000, 0x10FFFF))
    assert ANY_TEXT.after("\ud800") is NOTHING
    assert outside(((0xE000, 0x10FFFF),)) == ((0, 0xD7FF),)


def test_nothing_can_t_be_written() -> None:
    with pytest.raises(Unreadable):
        NOTHING.written()


def test_mapped() -> None:
    shouted = mapped(
        written_as("(a|b)c?[d-e]{2}"), lambda ranges: any_of((low - 32, high - 32) for low, high in ranges)
    )
    assert shouted is written_as("(A|B)C?[D-E]{2}")
