"""How many of 100 forced tool calls of a running service are calls that match their tool's schema.

    python tools/forced_calls.py --base-url http://127.0.0.1:8000/v1 --api-key KEY --model deepseek-v3

Ten tools, ten seeds each; half the requests stream, half name the tool instead of requiring a call. Prints a
line for each failure and the score; the exit code is 0 for 100 of 100.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fakes.json_validator import mismatches

NAME = {"type": "string", "maxLength": 40}
SCHEMAS: dict[str, tuple[str, dict[str, Any]]] = {
    "get_weather": (
        "What is the weather in Paris, in degrees Celsius?",
        {
            "type": "object",
            "properties": {"city": NAME, "unit": {"type": "string", "enum": ["°C", "°F"]}},
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    ),
    "set_thermostat": (
        "Make it 21.5 degrees in the living room.",
        {
            "type": "object",
            "properties": {
                "room": {"enum": ["küche", "salon", "寝室", "ванная"]},
                "degrees": {"type": "number", "minimum": 5, "maximum": 30, "multipleOf": 0.5},
            },
            "required": ["room", "degrees"],
        },
    ),
    "book_table": (
        "Book a table for four on the 5th of May 2027, outside if possible.",
        {
            "type": "object",
            "properties": {
                "date": {"type": "string", "format": "date"},
                "guests": {"type": "integer", "minimum": 1, "maximum": 12},
                "outside": {"type": "boolean"},
                "note": {"type": ["string", "null"], "maxLength": 60},
            },
            "required": ["date", "guests"],
        },
    ),
    "send_mail": (
        "Write to anna@example.com and bob@example.com that the meeting is at ten.",
        {
            "type": "object",
            "properties": {
                "to": {"type": "array", "items": NAME, "minItems": 1, "maxItems": 3},
                "subject": NAME,
                "priority": {"enum": [1, 2, 3]},
            },
            "required": ["to", "subject"],
        },
    ),
    "create_order": (
        "Order two blue shirts and a hat, to be sent to Rome.",
        {
            "type": "object",
            "properties": {
                "items": {
                    "type": "array",
                    "minItems": 1,
                    "maxItems": 3,
                    "items": {
                        "type": "object",
                        "properties": {
                            "article": NAME,
                            "count": {"type": "integer", "minimum": 1, "maximum": 99},
                            "colour": {"enum": ["blue", "red", None]},
                        },
                        "required": ["article", "count"],
                    },
                },
                "address": {"$ref": "#/$defs/address"},
            },
            "required": ["items", "address"],
            "$defs": {
                "address": {
                    "type": "object",
                    "properties": {"city": NAME, "zip": {"type": "string", "pattern": "^[0-9]{5}$"}},
                    "required": ["city", "zip"],
                }
            },
        },
    ),
    "draw": (
        "Draw a circle of radius 3.",
        {
            "type": "object",
            "properties": {
                "shape": {
                    "oneOf": [
                        {
                            "type": "object",
                            "properties": {
                                "kind": {"const": "circle"},
                                "radius": {"type": "integer", "exclusiveMinimum": 0, "maximum": 100},
                            },
                            "required": ["kind", "radius"],
                        },
                        {
                            "type": "object",
                            "properties": {
                                "kind": {"const": "square"},
                                "side": {"type": "integer", "exclusiveMinimum": 0, "maximum": 100},
                            },
                            "required": ["kind", "side"],
                        },
                    ]
                }
            },
            "required": ["shape"],
        },
    ),
    "count": ("How many users are there?", {"type": "object", "properties": {}}),
    "search": (
        "Find papers about whales since 1990.",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string", "minLength": 3, "maxLength": 60},
                "since": {"anyOf": [{"type": "integer", "minimum": 1900, "maximum": 2100}, {"type": "null"}]},
                "fields": {"type": "array", "items": {"enum": ["title", "abstract"]}, "maxItems": 2},
            },
            "required": ["query"],
        },
    ),
    "set_levels": (
        "Set the bass to 4 and the treble to 7.",
        {
            "type": "object",
            "properties": {
                "bass": {"type": "integer", "minimum": 0, "maximum": 10},
                "treble": {"type": "integer", "minimum": 0, "maximum": 10},
            },
            "required": ["bass", "treble"],
            "additionalProperties": False,
        },
    ),
    "translate": (
        "Translate 'good morning' into Greek.",
        {
            "type": "object",
            "properties": {
                "text": {"type": "string", "maxLength": 80},
                "language": {"type": "string", "enum": ["ελληνικά", "עברית", "中文"]},
                "formal": {"type": "boolean", "description": "polite form"},
            },
            "required": ["text", "language"],
        },
    ),
}
SEEDS = 10


def main() -> int:
    options = arguments()
    client = openai.OpenAI(base_url=options.base_url, api_key=options.api_key, max_retries=0, timeout=600)
    cases = [(name, seed) for seed in range(SEEDS) for name in SCHEMAS]
    with ThreadPoolExecutor(options.parallel) as pool:
        found = [*pool.map(lambda case: [*problems(client, options.model, *case)], cases)]
    for (name, seed), wrong in zip(cases, found, strict=True):
        for problem in wrong:
            print(f"{name}, seed {seed}: {problem}")
    good = sum(not wrong for wrong in found)
    print(f"{good} of {len(cases)} forced calls are valid")
    return 0 if good == len(cases) else 1


def problems(client: openai.OpenAI, model: str, name: str, seed: int) -> Iterator[str]:
    """What is wrong with one forced call."""
    question, schema = SCHEMAS[name]
    named = {"type": "function", "function": {"name": name}}
    request: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "tools": [{"type": "function", "function": {"name": name, "parameters": schema}}],
        "tool_choice": "required" if seed < SEEDS // 2 else named,
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": 512,
    }
    try:
        calls, finish = (streamed if seed % 2 else whole)(client, request)
    except openai.OpenAIError as error:
        yield str(error)
        return
    # OpenAI's API says "stop" for a named tool, and "tool_calls" for a required one; vLLM likewise.
    if not calls or finish not in ("tool_calls", "stop"):
        yield f"{len(calls)} calls, finish_reason {finish}"
    for called, text in calls:
        if called != name:
            yield f"called {called}"
        try:
            arguments = json.loads(text)
        except ValueError as error:
            yield f"{error}: {text!r}"
        else:
            yield from mismatches(arguments, schema, schema)


def whole(client: openai.OpenAI, request: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """Names and arguments of the calls, and the finish reason."""
    choice = client.chat.completions.create(**request).choices[0]
    calls = choice.message.tool_calls or []
    return [(call.function.name, call.function.arguments) for call in calls], choice.finish_reason


def streamed(client: openai.OpenAI, request: dict[str, Any]) -> tuple[list[tuple[str, str]], str]:
    """As `whole`, from a stream."""
    calls: dict[int, list[str]] = {}
    finish = ""
    for chunk in client.chat.completions.create(**request, stream=True):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            for delta in choice.delta.tool_calls or []:
                call = calls.setdefault(delta.index, ["", ""])
                call[0] += delta.function.name or ""
                call[1] += delta.function.arguments or ""
    return [(name, text) for name, text in calls.values()], finish


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Score of 100 forced tool calls of a running service.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", required=True)
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--parallel", type=int, default=4, help="requests at the same time")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
