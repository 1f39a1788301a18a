"""Any output at any split: the same answer, nothing lost, no call invented, little held back."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_api_compat.errors import ModelError
from deepseek_api_compat.protocol.deepseek.output_reader import HOLD_LIMIT, STARTS, Reader
from deepseek_api_compat.protocol.deepseek.segments import EOS
from deepseek_api_compat.protocol.events import Text
from deepseek_api_compat.protocol.job import Piece, TokenLogprob
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.tokenizer import Tokenizer
from protocol.deepseek.answers import add_up, cut, events_of, in_order, parser_of

FORMATS = ("r1", "v3.1", "v3.2", "v4.1")  # V3 is read as R1, V4 as V4.1
DSML = ("v3.2", "v4", "v4.1")
PAYLOAD = "天気玄é😀שλё7"  # characters that no markup has
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"

TEXTS = (
    "天気", "7", "😀", "שλ", "é", "\n", "\n\n", " ", "<", "</", "<｜", "｜", "<think>", "</think>", "</thi",
    EOS, EOS[:9], '"', "\\", '\\"', "{", "}", "[", '{"a": "玄"}', '{"a": "', "true", "`", "```",
)  # fmt: skip
MARKERS = {
    "r1": (
        CALLS, f"{CALLS}\n", CALLS_END, CALL_END, f"{CALL_END}\n", f"\n```{CALL_END}", f"```{CALL_END}",
        "\n```", CALLS[:-1], CALL_END[:-3], "\n```json\n", f"{CALL}function{SEP}", f"{CALL}function{SEP}look",
        f"{CALL}function{SEP}look\n```json\n", f"{CALL}function{SEP}look\n```json\n{{}}\n```{CALL_END}",
        f'{CALLS}{CALL}function{SEP}look\n```json\n{{"a": "玄"}}\n```{CALL_END}{CALLS_END}',
    ),
    "v3.1": (
        CALLS, CALLS_END, CALL_END, CALL, SEP, CALLS[:-1], CALL_END[:-3], f"{CALL}look{SEP}", f"{CALL}look",
        f"{CALL}look{SEP}{{}}{CALL_END}", f'{CALLS}{CALL}look{SEP}{{"a": "玄"}}{CALL_END}{CALLS_END}',
        f'{CALLS}{CALL}look{SEP}{{"a": "玄', f"{CALLS}{CALL}look{SEP}",
    ),
}  # fmt: skip
TAGS = (
    "<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "<｜DSML｜function_calls>", "</｜DSML｜function_calls>",
    "<｜DSML｜ calls>", "</｜DSML｜ calls>", "<｜DSML｜", "</｜DSML｜", "｜DSML｜", '">',
    '<｜DSML｜invoke name="', '<｜DSML｜invoke name="look">', '<｜DSML｜ invoke name="look">',
    '<｜DSML｜invoke name="look"/>', "</｜DSML｜invoke>", "</｜DSML｜ invoke>",
    '<｜DSML｜parameter name="', '<｜DSML｜parameter name="k">', '<｜DSML｜parameter name="k" string="true">',
    '<｜DSML｜parameter name="k" string="false">', "</｜DSML｜parameter>", "</｜DSML｜ parameter>",
    '<｜DSML｜parameter name="k" string="true">玄</｜DSML｜parameter>\n',
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="k" string="true">',
    '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="k">',
    "\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>",
)  # fmt: skip
# The end of the output cuts the tag of a parameter short.
HALF_PARAMETER = re.compile(r'<｜DSML｜ ?parameter name="[^"<]*("[^>]*)?$')
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def fragments(format: str) -> tuple[str, ...]:
    return TEXTS + (TAGS if format in DSML else MARKERS[format])


def outputs(format: str) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(fragments(format)), max_size=25).map("".join)


def payload(text: str) -> str:
    return "".join(character for character in text if character in PAYLOAD)


def split_answer(format: str, chunks: Any, start: str, tools: bool, finish: str) -> list[tuple[str, str]]:
    return in_order(events_of(parser_of(format, start, tools), chunks, finish))


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_no_split_changes_the_answer(data: st.DataObject, format: str) -> None:
    text = data.draw(outputs(format))
    known = data.draw(st.tuples(st.sampled_from(STARTS), st.booleans(), st.sampled_from(["stop", "length"])))
    whole = split_answer(format, [text], *known)
    assert split_answer(format, text, *known) == whole
    for _ in range(3):
        chunks = cut(text, data.draw(st.lists(st.integers(0, len(text)), max_size=9)))
        assert split_answer(format, chunks, *known) == whole


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_nothing_is_lost_and_no_call_invented(data: st.DataObject, format: str) -> None:
    """All that is no markup comes in its order; calls have been written, and ended, as many as are told."""
    text, start = data.draw(outputs(format)), data.draw(st.sampled_from(STARTS))
    tools, finish = data.draw(st.booleans()), data.draw(st.sampled_from(["stop", "length"]))
    events = events_of(parser_of(format, start, tools), [text], finish)
    told = payload("".join(part for _, part in in_order(events)))
    assert told in (payload(text), payload(HALF_PARAMETER.sub("", text.removesuffix(EOS))))
    answer = add_up(events)
    calls = len(answer["tool_calls"])
    assert calls <= max(text.count("invoke name="), text.count(SEP))
    if not tools and start != "tool_calls":
        assert not calls
    if answer["finish_reason"] != finish:
        assert (answer["finish_reason"], finish) == ("tool_calls", "stop")
        assert calls
        assert re.search(f"{CALL_END}|{CALLS_END}|</｜DSML｜|/>", text)


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_without_a_call_s_header_all_is_text(data: st.DataObject, format: str) -> None:
    """Verbatim, but for blocks without calls, one EOS, and in V4 and V4.1 framing and stray think tags."""
    parts = [
        part for part in fragments(format) if "look" not in part and "invoke" not in part and SEP not in part
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(parts), max_size=20)))
    answer = add_up(events_of(parser_of(format), text))
    wanted = re.sub(rf"{CALLS}[ \n]*{CALLS_END}", "", text.removesuffix(EOS))
    got = answer["content"]
    if format in DSML:
        markup = r"[ \n]|</think>|</?｜DSML｜(tool_calls|function_calls| calls)>"
        wanted, got = re.sub(markup, "", text.removesuffix(EOS)), re.sub(markup, "", got)
    assert got == wanted
    assert not answer["tool_calls"]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_no_more_than_a_marker_is_held(data: st.DataObject, format: str) -> None:
    long = [text * HOLD_LIMIT for text in ("\n", " ", "天", "<", "`", '"', "7", "{", "<｜", "\\")]
    parts = st.lists(st.sampled_from((*fragments(format), *long)), max_size=12)
    parser = parser_of(format, data.draw(st.sampled_from(STARTS)))
    assert isinstance(parser, Reader)
    size = data.draw(st.sampled_from([1, 7, 700]))
    text = "".join(data.draw(parts))
    for piece in (text[at : at + size] for at in range(0, len(text), size)):
        parser.feed(Piece(text=piece))
        assert len(parser._held) - parser._done + len(parser._eos) <= HOLD_LIMIT + 2 * len(EOS) + 5


@pytest.mark.parametrize("format", FORMATS)
@given(words=st.lists(st.sampled_from(["天気", "it", " is", ".", "😀", " {", '"', "\\n"]), max_size=9))
@quick
def test_plain_text_is_not_held_at_all(words: list[str], format: str) -> None:
    parser = parser_of(format)
    for word in words:
        assert parser.feed(Piece(text=word)) == [Text(0, word)]


# What a model means, written as it should be.

# Text with a marker of its own can't be written in every format.
ANY_TEXT = st.text(st.characters(exclude_characters="｜", exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | ANY_TEXT,
    lambda value: st.lists(value, max_size=3) | st.dictionaries(ANY_TEXT, value, max_size=3),
    max_leaves=12,
)
KEYS = st.text(st.characters(exclude_characters='"<\\', exclude_categories=["Cs", "Cc"]))
WORDS = st.text(st.characters(exclude_characters="<", exclude_categories=["Cs"])).filter(
    lambda text: text == text.strip("\n")
)


def written(format: str, calls: list[tuple[str, dict[str, Any]]], ascii: bool) -> str:
    """Calls as the format's own prompts have them in their history."""
    if not calls:
        return ""
    if format not in DSML:
        if format == "v3.1":
            texts = [f"{CALL}{name}{SEP}{json.dumps(of, ensure_ascii=ascii)}{CALL_END}" for name, of in calls]
            return CALLS + "".join(texts) + CALLS_END
        texts = [
            f"{CALL}function{SEP}{name}\n```json\n{json.dumps(of, ensure_ascii=ascii)}\n```{CALL_END}"
            for name, of in calls
        ]
        return CALLS + "\n".join(texts) + CALLS_END
    blank = " " if format == "v4.1" else ""
    block = {"v3.2": "function_calls", "v4": "tool_calls", "v4.1": " calls"}[format]
    text = f"\n\n<｜DSML｜{block}>\n"
    for name, arguments in calls:
        text += f'<｜DSML｜{blank}invoke name="{name}">\n'
        for key, value in arguments.items():
            string = isinstance(value, str)
            shown = value if string else json.dumps(value, ensure_ascii=ascii)
            kind = str(string).lower()
            text += (
                f'<｜DSML｜{blank}parameter name="{key}" string="{kind}">{shown}</｜DSML｜{blank}parameter>\n'
            )
        text += f"</｜DSML｜{blank}invoke>\n"
    return text + f"</｜DSML｜{block}>"


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_what_a_model_means_is_what_is_read(data: st.DataObject, format: str) -> None:
    thought, text = data.draw(WORDS), data.draw(WORDS)
    names = st.text("abcXYZ_-09", min_size=1, max_size=64)
    calls = data.draw(st.lists(st.tuples(names, st.dictionaries(KEYS, JSON, max_size=4)), max_size=4))
    ends = EOS if data.draw(st.booleans()) else ""
    whole = f"{thought}</think>{text}{written(format, calls, data.draw(st.booleans()))}{ends}"
    size = data.draw(st.integers(1, 40))
    chunks = [whole[at : at + size] for at in range(0, len(whole), size)]
    answer = add_up(events_of(parser_of(format, "reasoning"), chunks))
    assert (answer["reasoning_content"], answer["content"]) == (thought, text)
    got = [(call["name"], json.loads(call["arguments"])) for call in answer["tool_calls"]]
    assert got == calls
    assert answer["finish_reason"] == ("tool_calls" if calls else "stop")


# Token by token, with DeepSeek's own tokens.

CONTROL = re.compile(r"(<｜[^<>｜]+｜>|｜DSML｜|</?think>)")


def tokens_of(tokenizer: Tokenizer, text: str) -> list[str]:
    """The texts of the tokens a model would write: control tokens where it has them."""
    detokeniser = tokenizer.detokeniser()
    tokens = []
    for part in CONTROL.split(text):
        try:
            ids = tokenizer.encode([Segment(part, bool(CONTROL.fullmatch(part)))])
        except ModelError:
            ids = tokenizer.encode_text(part)
        tokens += [detokeniser.feed([id]) for id in ids]
    return [*tokens, detokeniser.close()]


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_token_by_token(data: st.DataObject, format: str, tokenizer_of: dict[str, Tokenizer]) -> None:
    text, start = data.draw(outputs(format)), data.draw(st.sampled_from(STARTS))
    tokens = tokens_of(tokenizer_of[format], text)
    assert "".join(tokens) == text
    assert split_answer(format, tokens, start, True, "stop") == split_answer(
        format, [text], start, True, "stop"
    )


# Logprobs.


def token(text: str) -> TokenLogprob:
    return TokenLogprob(text, -1.0, list(text.encode()))


@pytest.mark.parametrize("format", FORMATS)
@given(data=st.data())
@quick
def test_logprobs_are_those_of_the_text(data: st.DataObject, format: str) -> None:
    """Where no token has both, each of the content comes once, with its text, and none of markup."""
    tokens = [
        token
        for part in data.draw(st.lists(st.sampled_from(fragments(format)), max_size=20))
        for token in re.findall(r"[<｜]?[^<｜\n\"{` ]+|.|\n", part)
    ]
    parser = parser_of(format, data.draw(st.sampled_from(STARTS)))
    pieces = [*(Piece([1], text, [token(text)]) for text in tokens), Piece(finish="stop")]
    events = [event for piece in pieces for event in parser.feed(piece)]
    for event in events:
        if isinstance(event, Text) and event.logprobs:
            assert event.text.endswith(event.logprobs[-1].token) or not event.text
    kept = [one.token for event in events if isinstance(event, Text) for one in event.logprobs or ()]
    content = "".join(event.text for event in events if isinstance(event, Text))
    assert "".join(kept) == content
