"""Golden vectors of model outputs, at every kind of split, and broken outputs."""

import json
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.errors import EngineFailed
from deepseek_api_compat.protocol.deepseek import output
from deepseek_api_compat.protocol.events import Event, Finish, Reasoning, Text, ToolCall
from deepseek_api_compat.protocol.job import Piece, TokenLogprob

GOLDEN = Path(__file__).parents[2] / "golden" / "outputs.jsonl"
RECORDS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").split("\n") if line]
CALL = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}<｜tool▁call▁end｜>"


def of(format: str) -> list[dict[str, Any]]:
    return [record for record in RECORDS if record["format"] == format]


def run(record: dict[str, Any], chunks: Iterable[str]) -> dict[str, Any]:
    ids = count()
    parser = output.parser(
        record["format"],
        start=record["start"],
        tools_declared=record["tools_declared"],
        tools=record.get("tools", []),
        new_id=lambda: f"call_{next(ids)}",
    )
    pieces = [*(Piece(text=chunk) for chunk in chunks), Piece(finish=record["engine_finish"])]
    return add_up([event for piece in pieces for event in parser.feed(piece)] + parser.close())


def add_up(events: list[Event]) -> dict[str, Any]:
    calls: list[dict[str, Any]] = []
    for event in events:
        if isinstance(event, ToolCall):
            if event.call_index == len(calls):
                assert event.id == f"call_{event.call_index}"
                calls.append({"name": event.name, "arguments": ""})
            else:
                assert event.id is None
                assert event.name is None
            calls[event.call_index]["arguments"] += event.arguments
    finishes = [event.reason for event in events if isinstance(event, Finish)]
    assert len(finishes) == 1
    return {
        "content": "".join(event.text for event in events if isinstance(event, Text)),
        "reasoning_content": "".join(event.text for event in events if isinstance(event, Reasoning)),
        "tool_calls": calls,
        "finish_reason": finishes[0],
    }


def same_arguments(got: str, wanted: str) -> bool:
    if wanted == "*":
        return True
    try:
        return bool(json.loads(got) == json.loads(wanted))
    except ValueError:
        return got == wanted


def right(got: dict[str, Any], record: dict[str, Any]) -> bool:
    trim = "\n" if record.get("judgement") else ""
    return any(
        got["content"].strip(trim) == (wanted["content"] or "").strip(trim)
        and got["reasoning_content"] == (wanted["reasoning_content"] or "")
        and got["finish_reason"] == wanted["finish_reason"]
        and len(got["tool_calls"]) == len(wanted["tool_calls"])
        and all(
            call["name"] == other["name"] and same_arguments(call["arguments"], other["arguments"])
            for call, other in zip(got["tool_calls"], wanted["tool_calls"], strict=True)
        )
        for wanted in [record["expected"], *record.get("also_acceptable", [])]
    )


@pytest.mark.parametrize("format", output.FORMATS)
def test_golden_vectors(format: str) -> None:
    records = of(format)
    assert records
    wrong = {r["id"] for r in records if not right(run(r, r.get("chunks") or [r["output"]]), r)}
    wrong |= {r["id"] for r in records if not right(run(r, [r["output"]]), r)}
    assert sorted(wrong) == []


@pytest.mark.parametrize("format", output.FORMATS)
def test_no_split_changes_the_answer(format: str) -> None:
    wrong = set()
    for record in of(format):
        text = record["output"]
        whole = run(record, [text])
        if run(record, text) != whole:
            wrong.add(record["id"])
        for at in range(1, len(text), 1 if record["id"].endswith("-a") else 7):
            if run(record, [text[:at], text[at:]]) != whole:
                wrong.add(record["id"])
    assert sorted(wrong) == []


@given(st.data())
def test_broken_outputs_parse_alike_at_any_split(data: st.DataObject) -> None:
    record = data.draw(st.sampled_from([r for r in RECORDS if r["format"] in output.FORMATS]))
    text = record["output"]
    a, b = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    text = data.draw(st.sampled_from([text[:a], text[:a] + text[b:], text[:b] + text[a:]]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=9)))
    chunks = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert run(record, chunks) == run(record, [text])


def test_logprobs_stay_with_text() -> None:
    parser = output.parser("v3.1", start="content", tools_declared=True, tools=["now"])
    one, two = TokenLogprob("a", -0.5, [97]), TokenLogprob("<", -1.5, [60])
    assert parser.feed(Piece([1], "a", [one])) == [Text(0, "a", [one])]
    assert parser.feed(Piece([2], "<", [two])) == []
    assert parser.feed(Piece([3], "b")) == [Text(0, "<b", [two])]


def test_arguments_stream_as_they_are_written() -> None:
    parser = output.parser(
        "v3.1", start="content", tools_declared=True, tools=["now"], new_id=lambda: "call_x"
    )
    name, _, rest = CALL.partition("{}")
    assert parser.feed(Piece(text=name)) == [ToolCall(0, 0, "call_x", "now")]
    assert parser.feed(Piece(text="{")) == [ToolCall(0, 0, arguments="{")]
    assert parser.feed(Piece(text="}" + rest)) == [ToolCall(0, 0, arguments="}")]
    assert parser.feed(Piece(finish="stop")) == [Finish(0, "tool_calls")]


def test_an_answer_that_just_ends_is_a_fault() -> None:
    with pytest.raises(EngineFailed, match="without saying why"):
        output.parser("r1", start="reasoning", tools_declared=False, tools=[]).close()


def test_what_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match="not 'v9'"):
        output.parser("v9", start="content", tools_declared=False, tools=[])
    with pytest.raises(ValueError, match="not 'middle'"):
        output.parser("v3.1", start="middle", tools_declared=False, tools=[])
