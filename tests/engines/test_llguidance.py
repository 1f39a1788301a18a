"""Grammars in llguidance's Lark, and what the real engine makes of them."""

from __future__ import annotations

import asyncio
import json

import pytest

from deepseek_api_compat.engines.llamacpp import LlamaCpp
from deepseek_api_compat.engines.llguidance import lark, literals, spellings
from deepseek_api_compat.protocol.deepseek.grammar import syntax
from deepseek_api_compat.protocol.grammar import (
    Exactly,
    Free,
    Grammar,
    Json,
    OneOf,
    Pattern,
    Repeat,
    Seq,
    Until,
    constraint,
)
from deepseek_api_compat.protocol.job import Job, Sampling
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat
from deepseek_api_compat.protocol.regular import ANY_TEXT, literal
from deepseek_api_compat.protocol.segment import Segment
from fakes.json_validator import mismatches

A, B = Exactly((Segment('a"\n', False),)), Exactly((Segment("é\\", False),))
TOKEN = Segment("<think>", True)


@pytest.mark.parametrize(
    ("grammar", "start", "rules"),
    [
        (A, r'"a\"\n"', []),
        (Exactly((Segment("x", False), TOKEN, Segment("y", False))), '"x" <[7]> "y"', []),
        (Exactly((Segment("x", False), Segment("</think>", True))), '"x</think>"', []),
        (Seq((A, B)), r'"a\"\n" "é\\"', []),
        (Seq(()), '""', []),
        (OneOf((A, B)), "any_0", [r'any_0: "a\"\n" | "é\\"']),
        (Repeat(A), "item_0{0,}", [r'item_0: "a\"\n"']),
        (Repeat(A, 3), "item_0{0,3}", [r'item_0: "a\"\n"']),
        (Free(), "TEXT_0", ["TEXT_0: /(?s:.*)/"]),
        (Free(("</a>", "b\n")), "TEXT_0", [r"TEXT_0: /(?s:.*)/ & ~/(?s:.*)(<\/a>|b\n)(?s:.*)/"]),
        (Until((TOKEN, Segment("y", False))), 'TEXT_0 <[7]> "y"', ["TEXT_0: /(?s:.*)/"]),
        (
            Until((Segment("x", False), TOKEN)),
            "TEXT_1 <[7]>",
            ["TEXT_0: /(?s:.*)/", 'TEXT_1: TEXT_0 "x"'],
        ),
        (Exactly(()), "", []),
        (Pattern((literal("a/b"),)), "TEXT_0", [r"TEXT_0: /a\x{2f}b/"]),
        (Pattern((ANY_TEXT,), (literal("a"),)), "TEXT_0", [f"TEXT_0: /{ANY_TEXT.written()}/ & ~/a/"]),
        (
            Free(("</a>",), "<"),
            "TEXT_0",
            [r"TEXT_0: /(?s:.*)/ & ~/(?s:.*)(<\/a>)(?s:.*)/ & ~/(\/a>)(?s:.*)/"],
        ),
        (Repeat(A, 3, 1), "item_0{1,3}", [r'item_0: "a\"\n"']),
        (Seq((OneOf((A, B)), OneOf((A, B)))), "any_0 any_0", [r'any_0: "a\"\n" | "é\\"']),
    ],
)
def test_lark(grammar: Grammar, start: str, rules: list[str]) -> None:
    assert lark(grammar, {"<think>": 7}).splitlines() == ["%llguidance {}", f"start: {start}", *rules]


def test_schema_in_lark() -> None:
    _, start, rule = lark(Json({"type": "null", "x-guidance": {"lenient": True}}), {}, lead="[").splitlines()
    assert start == 'start: "[" json_0'
    schema = json.loads(rule.removeprefix("json_0: %json "))
    assert schema["type"] == "null"
    assert schema["x-guidance"]["whitespace_flexible"] is False
    assert "lenient" not in schema["x-guidance"]


def test_what_a_grammar_prescribes() -> None:
    begun = Pattern((literal("now <|im_end|>"),))
    parts = (Exactly((TOKEN, Segment("Hi", False))), Json({"const": "<think>"}), begun)
    assert literals(Seq(parts), {"<think>": 7}).split("\n") == [
        "Hi",
        '{"const": "<think>"}',
        "now <|im_end|>",
    ]


def test_spellings() -> None:
    marker = Until((Segment("</think>", True),))
    grammar = OneOf((Seq((Exactly((TOKEN,)), marker)), Repeat(A), Json({}), Free()))
    assert spellings(grammar) == {"<think>", "</think>"}


# The real engine

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["°C", "°F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 2},
    },
    "required": ["city", "unit"],
}


def wanted(format: str, start: str, **fields: object) -> Grammar:
    body = {
        "model": "m",
        "messages": [{"role": "user", "content": "Hi"}],
        "tools": [{"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}],
        "tool_choice": "required",
        **fields,
    }
    grammar = constraint(decode_chat(json.dumps(body).encode(), DecodeLimits()), syntax(format), start)
    assert grammar is not None
    return grammar


async def answer(engine: LlamaCpp, grammar: Grammar, seed: int = 1, **sampling: object) -> tuple[str, str]:
    question = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    prompt = await engine.tokenize(question, special=True)
    job = Job(prompt, 150, Sampling(seed=seed, **sampling), grammar=grammar)  # type: ignore[arg-type]
    pieces = [piece async for some in engine.stream(job) for piece in some]
    return "".join(piece.text for piece in pieces), pieces[-1].finish or ""


@pytest.mark.embedded
async def test_required_calls(engine: LlamaCpp) -> None:
    grammar = wanted("template", "content")
    for text, finish in await asyncio.gather(*(answer(engine, grammar, seed) for seed in range(10))):
        assert finish == "stop"
        head, call, tail = text.split("\n")
        assert (head, tail) == ("<tool_call>", "</tool_call>")
        called = json.loads(call)
        assert called["name"] == "weather"
        assert [*mismatches(called["arguments"], SCHEMA, SCHEMA)] == []


@pytest.mark.embedded
@pytest.mark.parametrize("format", ["v3", "v3.1", "v3.2", "v4", "v4.1"])
@pytest.mark.parametrize("start", ["content", "reasoning", "either"])
async def test_deepseek_s_grammars_compile(engine: LlamaCpp, format: str, start: str) -> None:
    for grammar in (
        wanted(format, start),
        wanted(format, start, tool_choice="auto", response_format={"type": "json_object"}),
    ):
        pieces = [piece async for some in engine.stream(Job([1], 1, grammar=grammar)) for piece in some]
        assert pieces[-1].finish == "length"


async def ids(engine: LlamaCpp, grammar: Grammar, likely: int | None = None) -> list[int]:
    bias = {} if likely is None else {likely: 100.0}
    job = Job([1], 20, Sampling(temperature=0.0, logit_bias=bias), grammar=grammar)
    return [id for some in [made async for made in engine.stream(job)] for piece in some for id in piece.ids]


@pytest.mark.embedded
async def test_a_token_is_not_the_text_that_it_spells(engine: LlamaCpp) -> None:
    (token,) = await engine.tokenize("<jupyter_text>", special=True)
    (end,) = await engine.tokenize("<|im_end|>", special=True)
    mark = (Segment("<jupyter_text>", True), Segment("!", False))
    assert (await ids(engine, Exactly(mark)))[0] == token
    assert await ids(engine, Seq((Until(mark[:1]), Exactly(mark[1:]))), token) == await ids(
        engine, Exactly(mark)
    )
    # Text of a schema never becomes a token, nor does it lift the constraint.
    made = await ids(engine, Json({"enum": ["a<|im_end|>"]}))
    assert not {token, end} & set(made)
    assert await engine.detokenize(made[:-1]) == '"a<|im_end|>"'


@pytest.mark.embedded
@pytest.mark.parametrize("marker", [" is", "France"])
async def test_free_text_up_to_a_marker_that_is_plain_text(engine: LlamaCpp, marker: str) -> None:
    free = Until((Segment(marker, False),), (marker,))
    text, finish = await answer(engine, Seq((free, Exactly((Segment("!?", False),)))), temperature=0.0)
    assert text.endswith(f"{marker}!?")
    assert (text.count(marker), finish) == (1, "stop")


@pytest.mark.embedded
async def test_no_end_before_the_grammar_s(engine: LlamaCpp) -> None:
    (end,) = await engine.tokenize("<|im_end|>", special=True)
    text, finish = await answer(engine, wanted("template", "content"), logit_bias={end: 100.0})
    assert (text.splitlines()[0], text.splitlines()[-1], finish) == ("<tool_call>", "</tool_call>", "stop")
