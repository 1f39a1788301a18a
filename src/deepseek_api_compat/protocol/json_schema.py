"""Which JSON Schemas a grammar can enforce, found out before any engine is asked.

The keywords are those of JSON Schema 2020-12; what is enforced is what llguidance 1.0 can
(its `docs/json_schema.md`; each keyword here was tried on the engine).
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import unquote

from deepseek_api_compat.errors import InvalidRequest

Schema = dict[str, Any]

MOST_REPEATS = 10_000  # a grammar unrolls what is counted: 100 million items take all memory there is
SAFE_INTEGER = 2**53 - 1  # beyond it, readers of JSON that use floating point change the value
MOST_PATTERN = 4096  # characters
# Schemas may refer to themselves: how far references are followed, and how many pairs are told apart.
_FOLLOWED = 8
_COMPARED = 10_000

_TYPES = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})
_UNENFORCED = frozenset(
    {
        "not",
        "if",
        "then",
        "else",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "propertyNames",
        "contains",
        "minContains",
        "maxContains",
        "uniqueItems",
        "unevaluatedItems",
        "unevaluatedProperties",
        "$dynamicRef",
        "$recursiveRef",
    }
)
# Unenforced keywords with a value that asks for nothing.
_HARMLESS = {"uniqueItems": False, "unevaluatedItems": True, "unevaluatedProperties": True}
_FORMATS = frozenset({"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"})
# JSON Schema defines these too, so they ask for something; other names (`int32`, `password`) only inform.
_UNENFORCED_FORMATS = frozenset(
    {
        "idn-email",
        "idn-hostname",
        "uri",
        "uri-reference",
        "uri-template",
        "iri",
        "iri-reference",
        "json-pointer",
        "relative-json-pointer",
        "regex",
    }
)
_ANNOTATIONS = ("title", "description", "default", "example", "examples", "$comment")
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_RANGES = (
    ("minLength", "maxLength"),
    ("minItems", "maxItems"),
    ("minProperties", "maxProperties"),
    ("minimum", "maximum"),
)
_ALTERNATIVES = ("anyOf", "oneOf", "allOf")
_NOT_REGULAR = re.compile(r"\\\\|\(\?<?[=!]|\\[1-9bBkAzZG]")  # a pair of backslashes is no start of an escape
# Beside a combinator, these narrow down what it allows.
ASSERTIONS = frozenset(
    {*_COUNTS, *_BOUNDS, *_ALTERNATIVES, "$ref", "type", "enum", "const", "pattern", "format"}
    | {"properties", "required", "additionalProperties", "patternProperties"}
    | {"items", "prefixItems", "additionalItems"}
)


def enforceable(schema: Schema, param: str) -> Schema:
    """The schema as a grammar enforces it: what matches it matches `schema` too.

    It is narrower in two points, so that small models come to an end: an object that declares properties has
    no others unless the schema says so, and an integer without bounds is one that every reader can hold.
    Raises InvalidRequest that names the keyword and its path for what can't be enforced, or is not valid.
    `param` is the schema's own path in the request.
    """
    checked = copy.deepcopy(schema)
    checked.pop("x-guidance", None)
    walk = _Walk(checked, param)
    try:
        walk.schema(checked, "")
    except RecursionError:  # a long chain of references: each target is checked inside of the one before
        raise InvalidRequest(f"`{param}`: its references lead too deep.", param=param) from None
    _narrow(walk.seen.values())
    return checked


def resolve(schema: Any, root: Schema) -> Any:
    """`schema`, or what its `$ref` stands for where that is all it says. The root has been checked."""
    for _ in range(_FOLLOWED):
        if not isinstance(schema, dict) or "$ref" not in schema or ASSERTIONS & schema.keys() != {"$ref"}:
            break
        schema = pointed(root, schema["$ref"])
    return schema


def part(root: Schema, schema: Any) -> Schema:
    """A schema out of `root` as one of its own, references included."""
    if not isinstance(schema, dict):
        return {} if schema else {"enum": []}
    if not any("$ref" in child for child in subschemas(schema)):
        return schema
    moved = copy.deepcopy({**root, "x-part": schema})
    for child in {id(child): child for child in (*subschemas(moved), *subschemas(moved["x-part"]))}.values():
        if isinstance(child.get("$ref"), str):
            child["$ref"] = "#/$defs/root" + child["$ref"].removeprefix("#")
    own = moved.pop("x-part")
    return {**own, "$defs": {"root": moved}}


def subschemas(schema: Any) -> Iterator[Schema]:
    """A schema and all objects in it that may be schemas; values of `enum` and `const` are none."""
    if isinstance(schema, dict):
        yield schema
        for name, value in schema.items():
            if name not in ("enum", "const", "default", "examples", "example"):
                yield from subschemas(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from subschemas(item)


class _Walk:
    """A look at every schema in `root`, also where only a reference leads; drops keywords without effect."""

    def __init__(self, root: Schema, param: str) -> None:
        self._root = root
        self._param = param
        self._pairs = iter(range(_COMPARED))
        self.seen: dict[int, Schema] = {}

    def schema(self, schema: Any, path: str) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise self._invalid(path, "must be an object or a boolean")
        if id(schema) in self.seen:
            return
        self.seen[id(schema)] = schema
        self._drop(schema)
        for name in schema:
            if name in _UNENFORCED:
                raise self._problem(f"{path}.{name}", name)
        self._types(schema, path)
        self._values(schema, path)
        self._numbers(schema, path)
        self._strings(schema, path)
        self._reference(schema, path)
        self._children(schema, path)
        self._alternatives(schema, path)

    def _drop(self, schema: Schema) -> None:
        for name, harmless in _HARMLESS.items():
            if schema.get(name) is harmless:
                del schema[name]
        format = schema.get("format")
        if isinstance(format, str) and format not in _FORMATS | _UNENFORCED_FORMATS:
            del schema["format"]
        # References are local ones only, so no name of a schema is needed, and no dialect but 2020-12.
        for name in ("$id", "$schema", *_ANNOTATIONS):
            schema.pop(name, None)

    def _types(self, schema: Schema, path: str) -> None:
        if "type" not in schema:
            return
        types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        if not types or not all(isinstance(name, str) and name in _TYPES for name in types):
            raise self._invalid(f"{path}.type", f"must be one or more of {', '.join(sorted(_TYPES))}")

    def _values(self, schema: Schema, path: str) -> None:
        values = schema.get("enum")
        if "enum" in schema and not (isinstance(values, list) and values):
            raise self._invalid(f"{path}.enum", "must be a list of values, and not empty")
        allowed = [value for value in values or () if is_of_type(value, schema)]
        if values and not allowed:
            raise self._invalid(f"{path}.enum", "has no value of the schema's type")
        if "const" in schema and not is_of_type(schema["const"], schema):
            raise self._invalid(f"{path}.const", "is not of the schema's type")

    def _numbers(self, schema: Schema, path: str) -> None:
        for name in _COUNTS:
            count = schema.get(name, 0)
            if not (isinstance(count, int) and not isinstance(count, bool) and count >= 0):
                raise self._invalid(f"{path}.{name}", "must be a whole number, 0 or more")
            if count > MOST_REPEATS:
                raise self._invalid(f"{path}.{name}", f"can't be enforced beyond {MOST_REPEATS}")
        for name in _BOUNDS:
            bound = schema.get(name, 1)
            if not isinstance(bound, (int, float)) or isinstance(bound, bool):
                raise self._invalid(f"{path}.{name}", "must be a number")
        if schema.get("multipleOf", 1) <= 0:
            raise self._invalid(f"{path}.multipleOf", "must be more than 0")
        for least, most in _RANGES:
            if {least, most} <= schema.keys() and schema[least] > schema[most]:
                raise self._invalid(f"{path}.{least}", f"is more than `{most}`")

    def _strings(self, schema: Schema, path: str) -> None:
        if "format" in schema and schema["format"] not in _FORMATS:
            named = repr(schema["format"])[:100]
            raise InvalidRequest(
                f"`{self._param}{path}.format`: the keyword `format` can't be enforced for {named}.",
                param=f"{self._param}{path}.format",
            )
        if "pattern" in schema:
            self._pattern(schema["pattern"], f"{path}.pattern")

    def _pattern(self, pattern: Any, path: str) -> None:
        if not isinstance(pattern, str):
            raise self._invalid(path, "must be a regular expression")
        if len(pattern) > MOST_PATTERN:
            raise self._invalid(path, f"can't be enforced beyond {MOST_PATTERN} characters")
        beyond = next((found[0] for found in _NOT_REGULAR.finditer(pattern) if found[0] != r"\\"), None)
        if beyond is not None:
            raise self._invalid(path, f"can't be enforced: {beyond} is more than a regular language has")
        try:
            with warnings.catch_warnings():
                # About sets in sets, which engines read in different ways.
                warnings.simplefilter("error", FutureWarning)
                # Python knows neither \p{...} nor JavaScript's names of groups.
                re.compile(re.sub(r"\\[pP](\{[^}]*\}|.)", "x", pattern).replace("(?<", "(?P<"))
        except (re.error, OverflowError, RecursionError, FutureWarning) as error:
            raise self._invalid(path, f"is no regular expression: {error}") from None

    def _reference(self, schema: Schema, path: str) -> None:
        if "$ref" not in schema:
            return
        target, passed = schema, 0
        while "$ref" in target:
            reference, passed = target["$ref"], passed + 1
            if passed > 100:
                raise self._invalid(f"{path}.$ref", "leads back to itself")
            if not isinstance(reference, str) or (reference != "#" and not reference.startswith("#/")):
                raise self._invalid(f"{path}.$ref", "must point into the schema itself: # or #/...")
            target = pointed(self._root, reference)
            if not isinstance(target, dict):
                break
        if target is None:
            raise self._invalid(f"{path}.$ref", "points to nothing")
        self.schema(target, "." + reference.removeprefix("#/").replace("/", ".") if reference != "#" else "")

    def _children(self, schema: Schema, path: str) -> None:
        for name in ("properties", "patternProperties", "$defs", "definitions"):
            children = schema.get(name, {})
            if not isinstance(children, dict):
                raise self._invalid(f"{path}.{name}", "must be an object")
            for key, child in children.items():
                if name == "patternProperties":
                    self._pattern(key, f"{path}.{name}")
                self.schema(child, f"{path}.{name}.{key}")
        for name in (*_ALTERNATIVES, "prefixItems", "items", "additionalItems", "additionalProperties"):
            child = schema.get(name, True)
            if isinstance(child, list) and name not in ("additionalItems", "additionalProperties"):
                for i, item in enumerate(child):
                    self.schema(item, f"{path}.{name}[{i}]")
            elif name in _ALTERNATIVES and name in schema:
                raise self._invalid(f"{path}.{name}", "must be a list of schemas")
            else:
                self.schema(child, f"{path}.{name}")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            raise self._invalid(f"{path}.required", "must be a list of names")

    def _alternatives(self, schema: Schema, path: str) -> None:
        for name in _ALTERNATIVES:
            if schema.get(name) == []:
                raise self._invalid(f"{path}.{name}", "must not be empty")
        options = schema.get("oneOf", [])
        for i, one in enumerate(options):
            for other in options[i + 1 :]:
                # Then "exactly one" is the same as "any", which is all that a grammar can say.
                if not _disjoint(one, other, self._root, self._pairs):
                    raise InvalidRequest(
                        f"`{self._param}{path}.oneOf`: the keyword `oneOf` can't be enforced where a value "
                        "may match several of its schemas; use `anyOf`.",
                        param=f"{self._param}{path}.oneOf",
                    )

    def _problem(self, path: str, keyword: str) -> InvalidRequest:
        param = self._param + path
        return InvalidRequest(f"`{param}`: the keyword `{keyword}` can't be enforced.", param=param)

    def _invalid(self, path: str, reason: str) -> InvalidRequest:
        param = self._param + path
        return InvalidRequest(f"`{param}` {reason}.", param=param)


def pointed(root: Schema, reference: str) -> Any:
    """What a local JSON pointer (RFC 6901) points to; None for nothing."""
    found: Any = root
    for step in unquote(reference).removeprefix("#").split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        elif isinstance(found, dict) and name in found:
            found = found[name]
        else:
            return None
    return found


def types(schema: Schema) -> frozenset[str]:
    """The types that a schema allows; "number" includes "integer"."""
    if "const" in schema or "enum" in schema:
        values = [schema["const"]] if "const" in schema else schema["enum"]
        return frozenset(_type(value) for value in values if is_of_type(value, schema))
    named = schema.get("type", list(_TYPES))
    found = frozenset([named] if isinstance(named, str) else named)
    return found | {"integer"} if "number" in found else found


def _type(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, float):
        return "integer" if value.is_integer() else "number"
    return {int: "integer", str: "string", list: "array"}.get(type(value), "object")


def is_of_type(value: Any, schema: Schema) -> bool:
    """Is it of a type that the schema names, or does that name none?"""
    return "type" not in schema or _type(value) in types({"type": schema["type"]})


def _disjoint(one: Any, other: Any, root: Schema, pairs: Iterator[int], depth: int = 0) -> bool:
    """Is it certain that no value matches both? `pairs` has an item for each pair that may be compared."""
    one, other = resolve(one, root), resolve(other, root)
    if not isinstance(one, dict) or not isinstance(other, dict):
        return one is False or other is False
    if depth > _FOLLOWED or next(pairs, None) is None:
        return False
    for first, second in ((one, other), (other, one)):
        for name in ("anyOf", "oneOf"):
            if name in first:
                return all(_disjoint(option, second, root, pairs, depth + 1) for option in first[name])
    common = types(one) & types(other)
    if not common:
        return True
    if all("const" in schema or "enum" in schema for schema in (one, other)):
        return not any(value in _constants(other) for value in _constants(one))
    return common == {"object"} and any(
        _disjoint(_property(one, name), _property(other, name), root, pairs, depth + 1)
        for name in {*one.get("required", ()), *other.get("required", ())}
    )


def _constants(schema: Schema) -> list[Any]:
    return [schema["const"]] if "const" in schema else list(schema["enum"])


def _property(schema: Schema, name: str) -> Any:
    return schema.get("properties", {}).get(name, schema.get("additionalProperties", True))


def _narrow(schemas: Iterable[Schema]) -> None:
    """See `enforceable`. What is combined with other schemas stays as wide as it is."""
    schemas = list(schemas)
    if any(_combines(schema) for schema in schemas):
        return
    for schema in schemas:
        declares = "properties" in schema and schema["properties"].keys() >= set(schema.get("required", ()))
        if declares and not schema.keys() & {"additionalProperties", "patternProperties", "minProperties"}:
            schema["additionalProperties"] = False
        if schema.get("type") == "integer" and not schema.keys() & {*_BOUNDS, "enum", "const"}:
            schema |= {"minimum": -SAFE_INTEGER, "maximum": SAFE_INTEGER}


def _combines(schema: Schema) -> bool:
    combinators = schema.keys() & {"$ref", *_ALTERNATIVES}
    beside = schema.keys() & {"properties", "patternProperties", "additionalProperties", "required"}
    return "allOf" in schema or len(combinators) > 1 or bool(combinators and beside)
