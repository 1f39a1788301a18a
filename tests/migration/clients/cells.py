"""What the rows share: a row runs its cells one after the other and prints a JSON line for each.

`{"cell": "chat", "got": {...}}`. What a cell throws becomes its line; the tests decide what is right. Only
the standard library is imported, for every row has an environment of its own.
"""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable, Iterable
from typing import Any

URL = f"{os.environ['BASE_URL']}/v1"
KEY = os.environ["DEEPSEEK_API_KEY"]
MODEL = "deepseek-v3"
PARIS = "What is the capital of France?"
WEATHER = "What is the weather in Paris?"
SUNNY = "Sunny, 21 degrees."
SAY_JSON = 'Say this again: {"capital": "Paris"}'
ASK_PERSON = "Invent a person. Answer in JSON with name and age."

CITY = {"type": "object", "properties": {"city": {"enum": ["Paris", "Rome"]}}, "required": ["city"]}
TOOL = {"name": "get_weather", "description": "Today's weather", "parameters": CITY}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def run(cells: Iterable[Callable[[], Any]]) -> None:
    for cell in cells:
        try:
            got = cell()
        except Exception as error:
            got = {"unexpected": repr(error), "where": traceback.format_exc()}
        print(json.dumps({"cell": cell.__name__, "got": got}), flush=True)


def thrown(ask: Callable[[], Any]) -> dict[str, Any]:
    """What `ask` raises; that it raises nothing is told too."""
    try:
        ask()
    except Exception as error:
        return {
            "class": type(error).__name__,
            "status": getattr(error, "status_code", None) or getattr(error, "http_status", None),
            "code": getattr(error, "code", None),
            "param": getattr(error, "param", None),
            "request_id": getattr(error, "request_id", None),
            "message": str(error),
        }
    return {"class": None}


def tokens(usage: Any) -> list[int]:
    """Of the prompt, of the answer, and of both, as OpenAI names them."""
    return [usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
