"""Stop strings end the answer's text at the same place, whatever the split."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall, Usage
from deepseek_api_compat.protocol.job import TokenLogprob
from deepseek_api_compat.protocol.stops import Stops

USAGE = Usage(1, 0, 1)


def token(text: str) -> TokenLogprob:
    return TokenLogprob(text, -1.0, list(text.encode()))


def run(stops: tuple[str, ...], groups: list[list[Event]]) -> tuple[list[Event], bool]:
    """All events until the stop, as a service would feed them."""
    reader = Stops(stops)
    out: list[Event] = []
    for group in groups:
        events, met = reader.feed(group)
        out += events
        if met:
            return out, True
    return out, False


def text_of(events: list[Event]) -> str:
    return "".join(event.text for event in events if isinstance(event, Text))


def test_a_stop_across_pieces_is_cut_out() -> None:
    reader = Stops(("END",))
    assert reader.feed([Text(2, "one E")]) == ([Text(2, "one ")], False)
    assert reader.feed([Text(2, "N")]) == ([], False)
    assert reader.feed([Text(2, "D two"), Text(2, "three")]) == ([Finish(2, "stop")], True)


def test_nothing_comes_after_a_stop() -> None:
    reader = Stops(("x",))
    assert reader.feed([Text(0, "ax")]) == ([Text(0, "a"), Finish(0, "stop")], True)
    assert reader.feed([Text(0, "b"), Finish(0, "length")]) == ([], True)


def test_a_stop_that_does_not_come_is_released() -> None:
    reader = Stops(("END",))
    assert reader.feed([Text(0, "the EN")]) == ([Text(0, "the ")], False)
    assert reader.feed([Text(0, "TRY")]) == ([Text(0, "ENTRY")], False)


@pytest.mark.parametrize("reason", ["stop", "length", "tool_calls"])
def test_the_end_releases_what_was_held(reason: str) -> None:
    events = [Text(0, "a E"), Finish(0, reason), USAGE]
    assert run(("END",), [events]) == ([Text(0, "a "), Text(0, "E"), Finish(0, reason), USAGE], False)


def test_stops_do_not_apply_to_reasoning_and_calls() -> None:
    events: list[Event] = [
        Reasoning(0, "wait, END?"),
        Text(0, "ok E"),
        ToolCall(0, 0, "c1", "END"),
        ToolCall(0, 0, arguments='{"x": "END"}'),
        Text(0, "ND"),
        Finish(0, "tool_calls"),
    ]
    out, met = run(("END",), [[event] for event in events])
    assert not met
    assert out[:3] == [Reasoning(0, "wait, END?"), Text(0, "ok "), Text(0, "E")]
    assert out[3:] == events[2:]


@pytest.mark.parametrize(
    ("stops", "text", "left"),
    [
        (("b", "abc"), "xabc", "xa"),  # complete first
        (("bc", "abc"), "xabc", "x"),  # complete at once: the longest
        (("abcd", "bc"), "abcd", "a"),
        (("aab",), "aaab", "a"),
        (("aba", "bb"), "abbab", "a"),
        (("\n\n",), "a\nb\n\nc", "a\nb"),
        (("完了",), "これで完了です", "これで"),
        (("😀!",), "ha 😀😀!", "ha 😀"),
    ],
)
def test_which_stop_wins(stops: tuple[str, ...], text: str, left: str) -> None:
    for groups in ([[Text(0, text)]], [[Text(0, c)] for c in text], [[Text(0, c) for c in text]]):
        out, met = run(stops, groups)  # type: ignore[arg-type]
        assert met
        assert text_of(out) == left
        assert out[-1] == Finish(0, "stop")


def test_calls_before_the_stop_keep_their_finish() -> None:
    call: list[Event] = [
        ToolCall(0, 0, "c1", "now"),
        ToolCall(0, 0, arguments='{"a":'),
        ToolCall(0, 0, arguments="1}"),
    ]
    assert run(("END",), [[*call, Text(0, "Done END")]]) == (
        [*call, Text(0, "Done "), Finish(0, "tool_calls")],
        True,
    )
    assert run(("END",), [[*call[:2], Text(0, "Done END")]])[0][-1] == Finish(0, "stop")


def test_logprobs_stay_with_the_text_their_tokens_end_in() -> None:
    reader = Stops(("END",))
    one, two, three, four = (token(text) for text in ("a", "b E", "N", "x"))
    assert reader.feed([Text(0, "a", [one])]) == ([Text(0, "a", [one])], False)
    assert reader.feed([Text(0, "b E", [two])]) == ([Text(0, "b ")], False)
    assert reader.feed([Text(0, "N", [three])]) == ([], False)
    assert reader.feed([Text(0, "x", [four])]) == ([Text(0, "ENx", [two, three, four])], False)


def test_logprobs_of_what_is_cut_are_left_out() -> None:
    tokens = [token(text) for text in ("a", "b", " E", "ND", "c")]
    events: list[Event] = [Text(0, "ab ENDc", tokens)]
    assert run(("END",), [events]) == ([Text(0, "ab ", tokens[:2]), Finish(0, "stop")], True)


def test_logprobs_of_half_characters() -> None:
    first, second = TokenLogprob("\ufffd", -1, [0xF0, 0x9F]), TokenLogprob("\ufffd", -1, [0x98, 0x80])
    reader = Stops(("END",))
    assert reader.feed([Text(0, "", [first])]) == ([Text(0, "", [first])], False)
    assert reader.feed([Text(0, "😀END", [second, token("END")])]) == (
        [Text(0, "😀", [second]), Finish(0, "stop")],
        True,
    )


@given(st.data())
def test_any_split_stops_at_the_same_place(data: st.DataObject) -> None:
    text = data.draw(st.text("abc", max_size=30))
    stops = tuple(data.draw(st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=4)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    logprobs = data.draw(st.booleans())
    reader, out, met = Stops(stops), list[Event](), False
    given_ = ""
    for part in parts:
        events, met = reader.feed([Text(0, part, [token(part)] if logprobs else None)])
        out += events
        given_ += part
        if met:
            break
        # Held back: less than the longest stop.
        assert len(given_) - len(text_of(out)) < max(map(len, stops))
    if not met:
        out += reader.feed([Finish(0, "length")])[0]
    ends = [
        (found.start() + len(stop), found.start())
        for stop in stops
        for found in [re.search(stop, text)]
        if found
    ]
    left = text[: min(ends)[1]] if ends else text
    assert met == bool(ends)
    assert text_of(out) == left
    assert out[-1] == Finish(0, "stop" if met else "length")
    assert [type(event) for event in out[:-1]] == [Text] * (len(out) - 1)
    if logprobs:
        tokens = [t.token for event in out if isinstance(event, Text) for t in event.logprobs or ()]
        whole = [part for part, end in zip(parts, [*cuts, len(text)], strict=True) if end <= len(left)]
        assert tokens == whole


def test_a_long_text_takes_linear_time() -> None:
    """Nested beginnings of a long stop are the worst case."""
    reader = Stops(("a" * 1000 + "b", "ab"))
    started = time.perf_counter()
    for _ in range(50_000):
        reader.feed([Text(0, "aaaa")])
    assert time.perf_counter() - started < 5
