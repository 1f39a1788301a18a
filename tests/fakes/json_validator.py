"""A small JSON Schema validator, written apart from the product's own reading of schemas."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from typing import Any

_TYPES = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
_CHECKS = {
    "minimum": lambda v, limit: not _TYPES["number"](v) or v >= limit,
    "maximum": lambda v, limit: not _TYPES["number"](v) or v <= limit,
    "exclusiveMinimum": lambda v, limit: not _TYPES["number"](v) or v > limit,
    "exclusiveMaximum": lambda v, limit: not _TYPES["number"](v) or v < limit,
    "multipleOf": lambda v, limit: not _TYPES["number"](v) or abs(v / limit - round(v / limit)) < 1e-9,
    "minLength": lambda v, limit: not isinstance(v, str) or len(v) >= limit,
    "maxLength": lambda v, limit: not isinstance(v, str) or len(v) <= limit,
    "pattern": lambda v, limit: not isinstance(v, str) or re.search(limit, v) is not None,
    "minItems": lambda v, limit: not isinstance(v, list) or len(v) >= limit,
    "maxItems": lambda v, limit: not isinstance(v, list) or len(v) <= limit,
    "const": lambda v, limit: _same(v, limit),
    "enum": lambda v, limit: any(_same(v, option) for option in limit),
    "required": lambda v, limit: not isinstance(v, dict) or all(name in v for name in limit),
}
_IGNORED = frozenset({"$defs", "title", "description"})


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and one == other


def mismatches(value: Any, schema: Any, root: Any, path: str = "$") -> Iterator[str]:
    """What is wrong with a value, a line each; nothing for a valid one. ValueError for an unknown keyword."""
    if schema is True:
        return
    if schema is False:
        yield f"{path}: must not be there"
        return
    for name, limit in schema.items():
        if name in _CHECKS:
            if not _CHECKS[name](value, limit):
                yield f"{path}: {value!r} breaks {name} {limit!r}"
        elif name == "type":
            names = [limit] if isinstance(limit, str) else limit
            if not any(_TYPES[name](value) for name in names):
                yield f"{path}: {value!r} is not {limit}"
        elif name == "format":
            yield from _format(value, limit, path)
        elif name == "$ref":
            target = root
            for step in limit.split("/")[1:]:
                target = target[step]
            yield from mismatches(value, target, root, path)
        elif name in ("anyOf", "oneOf"):
            fitting = sum(not any(mismatches(value, option, root)) for option in limit)
            if fitting != 1 and not (name == "anyOf" and fitting):
                yield f"{path}: {value!r} fits {fitting} of {name}"
        elif name == "items" and isinstance(value, list):
            for i, item in enumerate(value):
                yield from mismatches(item, limit, root, f"{path}[{i}]")
        elif name == "properties" and isinstance(value, dict):
            for key in value.keys() & limit.keys():
                yield from mismatches(value[key], limit[key], root, f"{path}.{key}")
        elif name == "additionalProperties" and isinstance(value, dict):
            for key in value.keys() - schema.get("properties", {}).keys():
                yield from mismatches(value[key], limit, root, f"{path}.{key}")
        elif name not in _IGNORED | {"items", "properties", "additionalProperties"}:
            raise ValueError(f"{path}: the keyword {name}")


def _format(value: Any, name: str, path: str) -> Iterator[str]:
    if name != "date":
        raise ValueError(f"{path}: the format {name}")
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        yield f"{path}: {value!r} is no date"
