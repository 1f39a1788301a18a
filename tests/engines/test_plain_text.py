"""Spellings are cut wherever they stand, and nothing else changes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.engines.plain_text import PlainText

THINK = PlainText(["<think>", "</think>"])


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("plain", ["plain"]),
        ("a<think>b", ["a<think", ">b"]),
        ("<think></think>", ["<think", "></think", ">"]),
        ("<think", ["<think"]),
        ("<Think>", ["<Think>"]),
    ],
)
def test_cut_before_the_last_sign(text: str, parts: list[str]) -> None:
    assert THINK.parts(text) == parts


def test_nothing_to_cut() -> None:
    for words in ([], ["x"]):
        assert PlainText(words).parts("xx") == ["xx"]
        assert PlainText(words).parts("") == []


def test_words_without_a_sign_are_cut_in_the_middle() -> None:
    assert PlainText(["|||", "tool"]).parts("a|||tool") == ["a|", "||to", "ol"]


@given(
    words=st.sets(st.text("ab<>", min_size=2, max_size=5), max_size=5),
    text=st.text("ab<>", max_size=40),
)
def test_no_part_has_a_spelling(words: set[str], text: str) -> None:
    parts = PlainText(words).parts(text)
    assert "".join(parts) == text
    assert all(parts)
    assert not any(word in part for word in words for part in parts)


def test_many_spellings_take_no_time_that_grows_with_their_square() -> None:
    assert len(THINK.parts("<think>" * 100_000)) == 100_001
