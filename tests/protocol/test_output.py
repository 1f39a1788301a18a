"""The plain format: text goes through, whatever the split, and the end says why."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.events import Event, Finish, Text
from deepseek_api_compat.protocol.job import Piece, TokenLogprob
from deepseek_api_compat.protocol.output import OutputParser, Parser


def parse(pieces: list[Piece], index: int = 0) -> list[Event]:
    parser = OutputParser(index)
    events = [event for piece in pieces for event in parser.feed(piece)]
    return events + parser.close()


def test_pieces_become_text_and_one_finish() -> None:
    pieces = [Piece([1], "Hel"), Piece([2], "lo"), Piece(finish="stop", completion_tokens=2)]
    assert parse(pieces, 3) == [Text(3, "Hel"), Text(3, "lo"), Finish(3, "stop")]


def test_text_on_the_last_piece_comes_before_the_finish() -> None:
    assert parse([Piece([1], "a", finish="length")]) == [Text(0, "a"), Finish(0, "length")]


def test_a_token_without_text_keeps_its_logprobs() -> None:
    half = TokenLogprob("\ufffd", -0.5, [0xF0, 0x9F])
    assert parse([Piece([1], "", [half]), Piece(finish="stop")]) == [Text(0, "", [half]), Finish(0, "stop")]


def test_a_token_without_text_is_no_event() -> None:
    assert OutputParser().feed(Piece([1])) == []


def test_an_answer_that_just_ends_is_a_fault() -> None:
    parser = OutputParser()
    parser.feed(Piece([1], "half an ans"))
    with pytest.raises(EngineFailed, match="without saying why"):
        parser.close()


def test_plain_output_is_never_reasoning() -> None:
    parser: Parser = OutputParser()
    parser.feed(Piece([1], "<think>"))
    assert not parser.thinking


@given(st.lists(st.text()), st.sampled_from(["stop", "length"]))
def test_no_split_loses_text(texts: list[str], reason: str) -> None:
    events = parse([*(Piece([0], text) for text in texts), Piece(finish=reason)])
    assert "".join(event.text for event in events if isinstance(event, Text)) == "".join(texts)
    assert events[-1] == Finish(0, reason)
