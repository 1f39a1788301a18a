"""Golden vectors of model outputs, at every kind of split, and with other words in them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_api_compat.protocol.deepseek import output
from protocol.deepseek.answers import add_up, cut, events_of, parser_of

GOLDEN = Path(__file__).parents[2] / "golden" / "outputs.jsonl"
RECORDS = [json.loads(line) for line in GOLDEN.read_text(encoding="utf-8").split("\n") if line]
EACH_PARSER = ("r1", "v3.1", "v3.2", "v4.1")


def of(format: str) -> list[dict[str, Any]]:
    return [record for record in RECORDS if record["format"] == format]


def run(record: dict[str, Any], chunks: Iterable[str]) -> dict[str, Any]:
    parser = parser_of(record["format"], record["start"], record["tools_declared"])
    return add_up(events_of(parser, chunks, record["engine_finish"]))


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
        every = format in EACH_PARSER and record["id"].endswith("-a")
        for at in range(1, len(text), 1 if every else 29):
            if run(record, [text[:at], text[at:]]) != whole:
                wrong.add(record["id"])
    assert sorted(wrong) == []


@given(st.data())
def test_broken_outputs_parse_alike_at_any_split(data: st.DataObject) -> None:
    record = data.draw(st.sampled_from(RECORDS))
    text = record["output"]
    a, b = sorted(data.draw(st.lists(st.integers(0, len(text)), min_size=2, max_size=2)))
    text = data.draw(st.sampled_from([text[:a], text[:a] + text[b:], text[:b] + text[a:]]))
    chunks = cut(text, data.draw(st.lists(st.integers(0, len(text)), max_size=9)))
    assert run(record, chunks) == run(record, [text])


# What the data of the first pack says, and what other data may say.
WORDS = ("Lisbon", "celsius", "harbour", "Light layers and comfortable shoes.", "A thin jacket is enough.",
         "May in Lisbon is mild, about 15-22 C.", "Evenings cool down by the river.")  # fmt: skip
OTHERS = {
    "Chinese": "东京的天气，很好。「是的」",
    "emoji": "👩‍👩‍👧‍👦🇵🇹 e\u0301 ✈️",
    "right to left": "شكراً! ١٢٣ שלום",
    "Russian": "Пальто — да, «шапка» — нет…",
    "code": "for (;;) { if (a < b && c > d) return {}; } // 100% <b>",
    "JSON": "[{}, [[{x: [1, 2.5e3]}]], null]",
    "much": "слово и дело; " * 20,
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_words_give_the_same_answer_with_other_words(kind: str) -> None:
    """Wherever the words stand: text, reasoning, arguments."""
    wrong, changed = set(), 0
    for record in RECORDS:
        if not record["id"].endswith("-a"):
            continue
        text = json.dumps({**record, "chunks": None}, ensure_ascii=False)
        for word in WORDS:
            text = text.replace(word, OTHERS[kind])
        other = json.loads(text)
        changed += other["output"] != record["output"]
        chunks = [other["output"][at : at + 5] for at in range(0, len(other["output"]), 5)]
        if not right(run(other, chunks), other):
            wrong.add(record["id"])
    assert sorted(wrong) == []
    assert changed > 300
