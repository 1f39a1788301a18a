"""Random answers that a grammar allows, without an engine."""

from __future__ import annotations

import json
import random
from typing import Any

from deepseek_api_compat.protocol.grammar import Exactly, Free, Grammar, Json, OneOf, Repeat, Seq, Until
from deepseek_api_compat.protocol.json_schema import resolve

TEXTS = ("", "a", "\n\nWell…", 'quote " and \\', "half a tag </｜", "漢字 😀", "<tool", "{}", "</think", "  ")


def sample(grammar: Grammar, rng: random.Random) -> str:
    """A text that the grammar allows; control tokens as their spelling."""
    if isinstance(grammar, Exactly):
        return "".join(segment.text for segment in grammar.segments)
    if isinstance(grammar, Json):
        return json.dumps(value(grammar.schema, grammar.schema, rng), ensure_ascii=False)
    if isinstance(grammar, Free):
        return _text(grammar.without, rng)
    if isinstance(grammar, Until):
        return _text(grammar.without, rng) + "".join(segment.text for segment in grammar.marker)
    if isinstance(grammar, OneOf):
        return sample(rng.choice(grammar.options), rng)
    if isinstance(grammar, Repeat):
        most = 3 if grammar.most is None else min(grammar.most, 3)
        return "".join(sample(grammar.item, rng) for _ in range(rng.randint(0, most)))
    assert isinstance(grammar, Seq)
    return "".join(sample(part, rng) for part in grammar.parts)


def _text(without: tuple[str, ...], rng: random.Random) -> str:
    return rng.choice([text for text in TEXTS if not any(banned in text for banned in without)])


def value(schema: Any, root: dict[str, Any], rng: random.Random, depth: int = 0) -> Any:
    """A value that matches a schema of the keywords used in these tests."""
    schema = resolve(schema, root)
    if schema is True:
        schema = {}
    for name in ("anyOf", "oneOf"):
        if name in schema:
            return value(rng.choice(schema[name]), root, rng, depth)
    if "const" in schema:
        return schema["const"]
    if "enum" in schema:
        return rng.choice(schema["enum"])
    type = schema.get("type", ["string", "integer", "boolean", "null"])
    if isinstance(type, list):
        return value({**schema, "type": rng.choice(type)}, root, rng, depth)
    if type == "object":
        return _object(schema, root, rng, depth)
    if type == "array":
        count = rng.randint(schema.get("minItems", 0), schema.get("maxItems", 2)) if depth < 4 else 0
        return [value(schema.get("items", True), root, rng, depth + 1) for _ in range(count)]
    if type == "string":
        return "2026-11-23" if schema.get("format") == "date" else rng.choice(TEXTS)
    if type == "integer":
        return rng.randint(schema.get("minimum", -9), schema.get("maximum", 9))
    return {"number": 2.5, "boolean": rng.random() < 0.5, "null": None}[type]


def _object(schema: dict[str, Any], root: dict[str, Any], rng: random.Random, depth: int) -> dict[str, Any]:
    made = {}
    for name, child in schema.get("properties", {}).items():
        if name in schema.get("required", ()) or (depth < 3 and rng.random() < 0.5):
            made[name] = value(child, root, rng, depth + 1)
    extra = schema.get("additionalProperties", True)
    if extra is not False and rng.random() < 0.5:
        made["more of it"] = value(extra, root, rng, depth + 1)
    return made
