"""Rests of grammars, judged by the engines' own compiler: after any part of an answer, the rest allows what
the whole grammar allows."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any

import pytest

from deepseek_api_compat.protocol.deepseek.grammar import syntax
from deepseek_api_compat.protocol.grammar import Grammar, Json, constraint
from deepseek_api_compat.protocol.json_schema import enforceable
from deepseek_api_compat.protocol.openai import DecodeLimits, decode_chat
from deepseek_api_compat.protocol.residual import residual
from fakes.grammar_judge import CONTROLS, END, Judge, read, spelled
from fakes.grammar_sampler import sample
from fakes.json_validator import mismatches

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["°C", "°F", None]},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "tags": {"type": "array", "items": {"enum": ["a", "ü"]}, "maxItems": 2},
    },
    "required": ["city", "unit"],
}
SEARCH = {
    "type": "object",
    "properties": {"q": {"type": "string"}, "in": {"anyOf": [{"type": "string"}, {"type": "number"}]}},
    "required": ["q"],
}
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
}
NULL, BOOLEAN = {"type": "null"}, {"type": "boolean"}
SCHEMAS: list[dict[str, Any]] = [
    {},
    {"type": "object"},
    {"type": "number"},
    {"type": ["string", "integer", "null"], "maxLength": 3, "minimum": 0},
    WEATHER,
    {
        "type": "object",
        "properties": {"a": NULL, "ab": BOOLEAN, "b": {"type": "number"}},
        "additionalProperties": {"type": "integer"},
    },
    {"type": "object", "properties": {"a": NULL}, "additionalProperties": True, "required": ["zz"]},
    {
        "type": "object",
        "patternProperties": {"^x": NULL, r"^y\d$": BOOLEAN},
        "additionalProperties": {"type": "integer"},
    },
    {"type": "object", "patternProperties": {"^x": NULL}, "additionalProperties": False},
    {"type": "object", "minProperties": 2, "maxProperties": 3, "additionalProperties": NULL},
    {"type": "object", "properties": {'a"b': NULL, "ü\n": NULL, "<｜": NULL}},
    {"type": "string", "pattern": r"^[a-z]{2,5}(-\d+)?$"},
    {"type": "string", "pattern": "]}|,$"},
    {"type": "string", "pattern": r"^\w+@\w+\.com$", "minLength": 8, "maxLength": 20},
    {"type": "string", "pattern": r"^\s.\S$"},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "integer", "minimum": 10, "maximum": 12345},
    {"type": "integer", "minimum": -50, "maximum": 7},
    {"type": "integer", "exclusiveMinimum": 5},
    {"type": "integer", "maximum": -3},
    {"type": "number", "minimum": 0.5, "maximum": 12.25},
    {"type": "number", "minimum": -1.5},
    {"type": "number", "maximum": 100},
    {"enum": ["red", "re", 1, 12, 1.5, None, True, {"a": [1, "x"], "b": {}}]},
    {"const": 'a\n"\\é'},
    {"enum": ["abc", "xyz"], "pattern": "^a"},
    {
        "anyOf": [
            {"type": "string", "maxLength": 3},
            {"type": "object", "properties": {"k": {"const": "a"}, "v": NULL}, "required": ["k", "v"]},
            {"type": "object", "properties": {"k": {"const": "ab"}, "v": BOOLEAN}, "required": ["k", "v"]},
        ]
    },
    {"oneOf": [NULL, {"type": "array", "items": {"type": "integer"}}, {"type": "string"}]},
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 3}}},
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}, "required": ["a"]},
            {"properties": {"a": {"maximum": 20}, "b": {"type": "string"}}, "required": ["b"]},
        ]
    },
    {
        "type": "object",
        "properties": {"a": {"type": "integer"}},
        "anyOf": [
            {"properties": {"b": NULL}, "required": ["b"]},
            {"properties": {"c": BOOLEAN}, "required": ["c"]},
        ],
    },
    {"type": "array", "prefixItems": [{"type": "integer"}, NULL, NULL], "items": BOOLEAN, "minItems": 2},
    {"type": "array", "prefixItems": [{"type": "integer"}, NULL], "items": False},
    {"type": "array", "items": [NULL, BOOLEAN], "additionalItems": {"type": "integer"}},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "minItems": 2, "maxItems": 5},
    *(
        {"type": "string", "format": name}
        for name in ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid")
    ),
]


def agree(whole: Judge, rest: Judge, sent: Sequence[int]) -> None:
    """Both allow the same next, but that escapes in names may be `\\/` (llguidance's versions differ)."""
    expected, found = whole.mask(), rest.mask()
    assert expected & ~found == 0, read(sent)
    more = found & ~expected
    assert more == 0 or (more == 1 << ord("/") and sent[-1] == ord("\\")), read(sent)


def check(
    grammar: Grammar, answer: list[int], controls: dict[str, int], rng: random.Random, share: float
) -> None:
    """Cut an answer everywhere; a share of the rests is judged."""
    whole = Judge(grammar, controls)
    assert whole.completes(answer), read(answer)
    for k in range(len(answer) + 1):
        if k:
            whole.take(answer[k - 1])
        sent = read(answer[:k])
        if sent is None:
            continue
        found = residual(grammar, sent)
        assert found is not None, sent
        if rng.random() > share:
            continue
        rest = Judge(found, controls)
        agree(whole, rest, answer[:k])
        assert rest.completes(answer[k:])
        for wrong in mutated(answer[k:], rng):
            assert rest.completes(wrong) == whole.completes(wrong), (sent, wrong)


def mutated(ids: list[int], rng: random.Random) -> list[list[int]]:
    if not ids:
        return [[*b"}"], [*b" "]]
    at = rng.randrange(len(ids))
    return [ids[:at] + ids[at + 1 :], [*ids[:at], rng.choice(b'",}]1a'), *ids[at:]], ids[:at]]


@pytest.mark.parametrize("n", range(len(SCHEMAS)))
def test_any_cut_of_a_json_text(n: int) -> None:
    schema = enforceable(SCHEMAS[n], "schema")
    rng = random.Random(n)
    check(Json(schema), Judge(Json(schema), {}).answer(rng), {}, rng, share=0.6)


def function(name: str, schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": schema, **fields}}


REQUESTS: dict[str, dict[str, Any]] = {
    "required": {
        "tools": [function("weather", WEATHER), function("search", SEARCH), function("now", {})],
        "tool_choice": "required",
    },
    "parallel": {
        "tools": [function("weather", WEATHER), function("search", SEARCH)],
        "tool_choice": "required",
        "parallel_tool_calls": True,
    },
    "named": {
        "tools": [function("search", SEARCH)],
        "tool_choice": {"type": "function", "function": {"name": "search"}},
    },
    "strict": {"tools": [function("weather", WEATHER, strict=True), function("any", SEARCH)]},
    "schema": {
        "response_format": {"type": "json_schema", "json_schema": {"name": "w", "schema": WEATHER}},
        "tools": [function("search", SEARCH)],
    },
    "object": {"response_format": {"type": "json_object"}},
}


@pytest.mark.parametrize("format", ["v3", "v3.1", "v3.2", "v4", "v4.1", "template"])
@pytest.mark.parametrize("request_name", REQUESTS)
def test_any_cut_of_an_answer(format: str, request_name: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **REQUESTS[request_name]}
    request = decode_chat(json.dumps(body).encode(), DecodeLimits())
    rng = random.Random(format + request_name)
    start = rng.choice(["content", "reasoning", "either"])
    grammar = constraint(request, syntax(format), start)
    assert grammar is not None
    controls = rng.choice([CONTROLS, {}])
    answer = spelled(sample(grammar, rng), controls)
    check(grammar, answer, controls, rng, share=12 / (len(answer) + 1))


@pytest.mark.parametrize(
    "cut", ['{"city": "Pa', '{"city": "Paris", "un', '{"city": "", "unit": "°F", "days": 1', "{"]
)
def test_what_is_made_of_a_rest_completes_the_json_text(cut: str) -> None:
    schema = enforceable(WEATHER, "schema")
    sent = [*cut.encode()]
    segments = read(sent)
    assert segments is not None
    rest = residual(Json(schema), segments)
    assert rest is not None
    rng = random.Random(cut)
    for _ in range(10):
        made = Judge(rest, {}).answer(rng)
        whole = json.loads(bytes(sent + made))
        assert [*mismatches(whole, schema, schema)] == []


@pytest.mark.parametrize(
    ("schema", "cut"),
    [
        ({"type": "integer", "multipleOf": 7}, "2"),
        ({"type": "number", "multipleOf": 0.25}, "-1"),
        ({"type": "number", "multipleOf": 0.5, "minimum": 10, "maximum": 99}, "3"),
        ({"type": "integer", "multipleOf": 1000}, "4"),
    ],
)
def test_a_number_that_must_be_a_multiple_is_given_its_last_digits(schema: dict[str, Any], cut: str) -> None:
    sent = read([*cut.encode()])
    assert sent is not None
    rest = residual(Json(schema), sent)
    assert rest is not None
    judge, rng = Judge(rest, {}), random.Random(cut)
    for _ in range(10):
        made = judge.answer(rng)
        assert [*mismatches(json.loads(cut + bytes(made).decode()), schema, schema)] == []


def test_an_answer_that_is_complete_has_an_empty_rest() -> None:
    sent = read([*b"[null]"])
    assert sent is not None
    rest = residual(Json({"const": [None]}), sent)
    assert rest is not None
    assert Judge(rest, {}).next() == {END}
