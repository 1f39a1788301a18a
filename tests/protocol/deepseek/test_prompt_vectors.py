"""Every golden prompt, byte for byte and id for id. What is not compared is listed here, with the reason."""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.deepseek import render
from deepseek_api_compat.protocol.deepseek.segments import USER
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat, decode_completion
from deepseek_api_compat.protocol.segment import Segment
from deepseek_api_compat.protocol.tokenizer import Tokenizer

Record = dict[str, Any]

RECORDS = {"v3": 163, "r1": 139, "v3.1": 154, "v3.2": 184, "v4": 250, "v4.1": 250}
REFUSED = {"v3": 0, "r1": 0, "v3.1": 0, "v3.2": 12, "v4": 15, "v4.1": 15}


def in_each_pack(*stems: str) -> list[str]:
    return [f"{stem}-{pack}" for stem in stems for pack in "abc"]


# The template forgets <｜tool▁calls▁begin｜> and its like in the second tool turn. What is right is what
# V3-0324's repaired template writes for the same messages.
DEFECTS = {
    **dict.fromkeys(in_each_pack("v3-tool-two-turns"), "v3-0324-tool-two-turns"),
    **dict.fromkeys(in_each_pack("r1-tool-two-turns-official"), "v3-0324-tool-two-turns"),
}

# The request spells control tokens, and the recorded ids are those of the whole string, where the
# spellings become control tokens. Ours must stay text: only the text is compared.
WHOLE_STRING_IDS = in_each_pack(
    "v3-0324-think-tag-inside-content",
    "v3.1-think-tag-inside-content",
    "v3.1-inject-everywhere",
    "v3.2-think-tag-inside-content",
    "v3.2-inject-everywhere",
)


@lru_cache
def vectors() -> dict[str, Record]:
    path = Path(__file__).parents[2] / "golden" / "prompts.jsonl"
    return {record["id"]: record for record in map(json.loads, path.read_bytes().splitlines())}


def of_format(format: str) -> list[Record]:
    return [record for record in vectors().values() if record["format"] == format]


def segments_of(record: Record) -> list[Segment]:
    fields = {"model": "m", **record["request"]}
    body = json.dumps(fields).encode()
    decode = decode_completion if "prompt" in fields else decode_chat
    functions = [tool["function"] for tool in fields["tools"]] if fields.get("tools") else None
    return render(record["format"], record.get("variant"), decode(body, DecodeLimits()), functions)


def text_of(record: Record) -> str | None:
    try:
        return "".join(segment.text for segment in segments_of(record))
    except InvalidRequest:
        return None


@pytest.mark.parametrize("format", RECORDS)
def test_text_is_exact(format: str) -> None:
    records = of_format(format)
    differ = [
        record["id"]
        for record in records
        if text_of(record) != record["prompt"] and record["id"] not in DEFECTS
    ]
    assert differ == []
    assert len(records) == RECORDS[format]
    assert sum(record["prompt"] is None for record in records) == REFUSED[format]


@pytest.mark.parametrize("format", RECORDS)
def test_ids_are_exact(format: str, tokenizer_of: dict[str, Tokenizer]) -> None:
    compared = [
        record
        for record in of_format(format)
        if record["prompt"] is not None and record["id"] not in (*DEFECTS, *WHOLE_STRING_IDS)
    ]
    differ = [
        record["id"]
        for record in compared
        if tokenizer_of[format].encode(segments_of(record)) != record.get("safe_ids", record["prompt_ids"])
    ]
    assert differ == []
    left_out = sum(vectors()[id]["format"] == format for id in (*DEFECTS, *WHOLE_STRING_IDS))
    assert len(compared) == RECORDS[format] - REFUSED[format] - left_out


def test_defects_are_not_imitated() -> None:
    for id, repaired in DEFECTS.items():
        right = vectors()[f"{repaired}-{id[-1]}"]
        assert vectors()[id]["defect"]
        assert vectors()[id]["request"]["messages"] == right["request"]["messages"]
        assert text_of(vectors()[id]) == right["prompt"]


def test_spelled_control_tokens_are_the_only_difference_to_the_ids_of_the_whole_string(
    v3_tokenizer: Tokenizer,
) -> None:
    controls = set(v3_tokenizer.controls.values())
    for id in WHOLE_STRING_IDS:
        record = vectors()[id]
        ids = v3_tokenizer.encode(segments_of(record))
        frame = [v3_tokenizer.controls[segment.text] for segment in segments_of(record) if segment.special]
        assert [id for id in ids if id in controls] == frame
        assert sum(id in controls for id in record["prompt_ids"]) > len(frame)
        assert v3_tokenizer.detokeniser().feed(ids) == record["prompt"]


def test_v3_with_tools_has_vllms_turns_without_its_white_space() -> None:
    """The records are vLLM's raw rendering: its own tool text, and the template's indentation all over."""
    records = of_format("v3-tools")
    for record in records:
        ours, vllms = (
            re.sub(r"\s+", "", prompt[prompt.index(USER) :]) if USER in prompt else ""
            for prompt in (text_of(record) or "", record["prompt"])
        )
        assert ours == vllms, record["id"]
    assert len(records) == 127
