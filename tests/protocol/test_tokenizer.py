from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.models import catalogue, prepared
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.tokenizer import Tokenizer

# The vocabulary ends at 128814 (V3); engines pad it to 129280 and may well sample an id of the padding.
ids_of_any_kind = st.lists(st.integers(0, 129_300), max_size=30)
SCRIPTS = "naïve — 好的，没问题。🐍👨🏽‍💻🇨🇳 e\u0301 שלום هذه 한국어 ไทย \U00020000 \ufffd\x00\n\t <think>"


@pytest.fixture(scope="session")
def reference() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(prepared.pull(catalogue.find("deepseek-v3-tokenizer"))))


@given(ids=ids_of_any_kind)
@settings(max_examples=300, deadline=None)
def test_detokenising_piecewise_equals_decoding_at_once(
    ids: list[int], v3_tokenizer: Tokenizer, reference: tokenizers.Tokenizer
) -> None:
    at_once = reference.decode(ids, skip_special_tokens=False)
    detokeniser = v3_tokenizer.detokeniser()
    assert "".join(detokeniser.feed([id]) for id in ids) + detokeniser.close() == at_once


def test_no_character_is_broken_between_tokens(v3_tokenizer: Tokenizer) -> None:
    ids = v3_tokenizer.encode_text(SCRIPTS)
    detokeniser = v3_tokenizer.detokeniser()
    pieces = [detokeniser.feed([id]) for id in ids]
    assert "" in pieces  # some characters do take several tokens
    assert sum(piece.count("\ufffd") for piece in pieces) == 1  # the one in the text
    assert "".join(pieces) == SCRIPTS
    assert detokeniser.close() == ""


@given(text=st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_text_survives_both_ways(text: str, v3_tokenizer: Tokenizer) -> None:
    detokeniser = v3_tokenizer.detokeniser()
    assert detokeniser.feed(v3_tokenizer.encode_text(text)) + detokeniser.close() == text


def test_an_incomplete_character_is_held_back_until_the_end(v3_tokenizer: Tokenizer) -> None:
    first = v3_tokenizer.encode_text("𠀀")[0]
    detokeniser = v3_tokenizer.detokeniser()
    assert (detokeniser.feed([first]), detokeniser.close()) == ("", "\ufffd")


def test_segments_of_text_merge_and_control_tokens_do_not(v3_tokenizer: Tokenizer) -> None:
    texts = random.Random(7).choices(["Hi", ".", "\n", "\n", " the", "re"], k=30)
    whole = v3_tokenizer.encode([Segment("".join(texts), False)])
    assert v3_tokenizer.encode([Segment(text, False) for text in texts]) == whole
    assert v3_tokenizer.encode([Segment(".", False), Segment("\n\n", False)]) == [339]
    user = Segment("<｜User｜>", True)
    assert v3_tokenizer.encode([Segment("<", False), user, user, Segment("a", False)]) == [
        30,
        128803,
        128803,
        67,
    ]


def test_spelling_a_control_token_is_not_writing_it(v3_tokenizer: Tokenizer) -> None:
    assert v3_tokenizer.encode([Segment("</think>", True)]) == [128799]
    assert 128799 not in v3_tokenizer.encode([Segment("</think>", False)])


def test_v41_has_its_system_token_where_v3_ends_thinking(
    v3_tokenizer: Tokenizer, v4_tokenizer: Tokenizer, v41_tokenizer: Tokenizer
) -> None:
    system = [Segment("<｜System｜>", True)]
    assert v41_tokenizer.encode(system) == [128799]
    assert v41_tokenizer.detokeniser().feed([128799]) == "<｜System｜>"
    for other in (v3_tokenizer, v4_tokenizer):
        with pytest.raises(ModelError, match="no token <｜System｜>"):
            other.encode(system)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(ModelError, match="can be read"):
        Tokenizer(path)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    path.write_text(json.dumps(json.loads(words.to_str())))
    with pytest.raises(ModelError, match="byte-level"):
        Tokenizer(path)
