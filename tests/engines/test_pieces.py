"""Ids and text that arrive apart, put together."""

from __future__ import annotations

import random

import pytest

from deepseek_api_compat.engines.pieces import PieceMaker, WholeCharacters
from deepseek_api_compat.protocol.job import Piece, TokenLogprob

TEXT = "Käse, 漢字 and 😀; the end."
BYTES = list(TEXT.encode())


def joined(pieces: list[Piece | None]) -> tuple[list[int], str]:
    there = [piece for piece in pieces if piece is not None]
    return [id for piece in there for id in piece.ids], "".join(piece.text for piece in there)


def logprob(token: str) -> TokenLogprob:
    return TokenLogprob(token, -1.0, list(token.encode()))


@pytest.mark.parametrize("seed", range(30))
async def test_any_chunking_gives_the_same_and_no_id_comes_before_its_text(seed: int) -> None:
    """As vLLM does it: text comes when a character is whole, ids at once, several at a time."""

    async def decoded(ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")

    chance, maker, whole = random.Random(seed), PieceMaker(), WholeCharacters(decoded)
    pieces: list[Piece | None] = []
    at = shown = 0
    while at < len(BYTES):
        step = chance.randint(1, 4)
        ids = BYTES[at : at + step]
        at += len(ids)
        text = bytes(BYTES[:at]).decode(errors="ignore")
        piece = maker.feed(ids, text[shown:], whole=await whole.at_end(ids))
        shown = len(text)
        if piece is not None:
            pieces.append(piece)
            ids_so_far, text_so_far = joined(pieces)
            assert bytes(ids_so_far).decode() == text_so_far
    pieces.append(maker.end())
    assert joined(pieces) == (BYTES, TEXT)
    assert maker.made == len(BYTES)


def test_what_may_become_a_stop_string_waits() -> None:
    maker = PieceMaker(["END", "never"])
    assert maker.feed([1], "go E") is None
    assert maker.feed([2], "N") is None
    assert maker.feed([3], "T") == Piece([1, 2, 3], "go ENT")
    assert maker.feed([4], " END") is None
    assert maker.end() == Piece([4], " ")
    assert maker.end() is None


def test_logprobs_of_a_stop_string_go_with_it() -> None:
    maker = PieceMaker(["stop"])
    assert maker.feed([1], "a", [logprob("a")]) == Piece([1], "a", [logprob("a")])
    assert maker.feed([2, 3, 4], "b stop", [logprob("b s"), logprob("t"), logprob("op")]) is None
    assert maker.end() == Piece([2, 3, 4], "b ", [logprob("b s")])


def test_hidden_tokens_leave_no_text_and_their_spelling_by_others_stays() -> None:
    maker = PieceMaker(hidden={9: "<end>"})
    assert maker.feed([1, 9], "x<end>") == Piece([1, 9], "x")
    assert maker.feed([2, 3], "<end>") == Piece([2, 3], "<end>")
    assert maker.feed([9], "<end>") == Piece([9], "")


async def test_endings_are_asked_about_once() -> None:
    asked = []

    async def decoded(ids: list[int]) -> str:
        asked.append(ids)
        return bytes(ids).decode(errors="replace")

    whole = WholeCharacters(decoded)
    for _ in range(2):
        assert await whole.at_end([65, 66])
        assert await whole.at_end([65, *"ä".encode()])
        assert not await whole.at_end([65, "ä".encode()[0]])
        assert await whole.at_end(["ä".encode()[0]])  # alone, its text tells
    assert len(asked) == len({tuple(ids) for ids in asked})
