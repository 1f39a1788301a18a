"""The values that a JSON Schema allows, one level deep, with all that is combined combined.

`allOf`, `anyOf` beside `properties`, `$ref` beside anything and so on are combined as by llguidance (its
`json/schema.rs`), which also fixes the order in which an object's properties are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any, TypeAlias

import msgspec

from deepseek_api_compat.protocol.json_formats import format_expr
from deepseek_api_compat.protocol.json_numbers import ANY_INTEGER, ANY_NUMBER, at_least, at_most, plain
from deepseek_api_compat.protocol.json_schema import Schema, is_of_type, pointed
from deepseek_api_compat.protocol.regular import ANY_CHARACTER, Expr, repeat
from deepseek_api_compat.protocol.regular_syntax import pattern

_TYPES = ("null", "boolean", "number", "string", "array", "object")
_MOST_LOOKS = 50_000  # at schemas, and at pairs of values
_DEEPEST = 100  # references and combinators in each other, around one value


class TooComplex(Exception):
    """A schema beyond what is taken apart here, or whose combinations are too many."""


class Word(msgspec.Struct, frozen=True):
    """One value: null, a boolean, a number or a string."""

    value: Any


class Text(msgspec.Struct, frozen=True):
    """Strings."""

    least: int = 0
    most: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


class Bound(msgspec.Struct, frozen=True):
    value: Decimal
    strict: bool


class Number(msgspec.Struct, frozen=True):
    """Numbers. multiples: of each of these."""

    integer: bool
    minima: tuple[Bound, ...] = ()
    maxima: tuple[Bound, ...] = ()
    multiples: tuple[Decimal, ...] = ()


class Array(msgspec.Struct, frozen=True):
    """Arrays. first: the schemas of the first items; items: that of the others."""

    least: int
    most: int | None
    first: tuple[Any, ...]
    items: Any


class Object(msgspec.Struct, frozen=True):
    """Objects. properties: in the order they are written. by_pattern: schemas by pattern of the name."""

    properties: dict[str, Any]
    required: tuple[str, ...]
    extra: Any
    by_pattern: dict[str, Any]
    least: int
    most: int | None


Value: TypeAlias = Word | Text | Number | Array | Object


class JsonValues:
    """The values of the schemas in `root`, to which their references point."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self._known: dict[int, tuple[Any, list[Value]]] = {}  # by the schema's id, which it keeps
        self._looked = 0

    def of(self, schema: Any) -> list[Value]:
        """What a schema allows: any of these, all combinations made. Raises TooComplex."""
        if id(schema) not in self._known:
            self._known[id(schema)] = (schema, self._values(schema, 0))
        return self._known[id(schema)][1]

    def _values(self, schema: Any, depth: int) -> list[Value]:
        self._look(1)
        if depth > _DEEPEST:
            raise TooComplex("its schemas lead too deep")
        if isinstance(schema, bool):
            schema = {} if schema else {"enum": []}
        found = _of_types(schema)
        for name in ("$ref", "oneOf", "anyOf", "allOf"):
            if name in schema:
                for options in self._combined(name, schema[name], depth + 1):
                    found = self._both(found, options)
        for name in ("enum", "const"):
            if name in schema:
                listed = schema[name] if name == "enum" else [schema[name]]
                found = self._both([_exactly(value) for value in listed if is_of_type(value, schema)], found)
        return found

    def _look(self, times: int) -> None:
        self._looked += times
        if self._looked > _MOST_LOOKS:
            raise TooComplex("too many schemas, or combinations of them")

    def _both(self, ones: list[Value], others: list[Value]) -> list[Value]:
        """What is among both."""
        self._look(len(ones) * len(others))
        met = (_meet(one, other) for one in ones for other in others)
        return [value for value in met if value is not None]

    def _combined(self, name: str, said: Any, depth: int) -> Iterator[list[Value]]:
        if name == "$ref":
            yield self._values(pointed(self._root, said), depth)
        elif name == "allOf":
            for part in said:
                yield self._values(part, depth)
        else:
            yield [value for option in said for value in self._values(option, depth)]


def _of_types(schema: Schema) -> list[Value]:
    """What its own keywords allow, type by type."""
    named = schema.get("type", _TYPES)
    types = [named] if isinstance(named, str) else list(named)
    found: list[Value] = []
    for type in types:
        if type == "null":
            found.append(Word(None))
        elif type == "boolean":
            found += [Word(True), Word(False)]
        elif type == "string":
            found.append(_text(schema))
        elif type == "array":
            found.append(_array(schema))
        elif type == "object":
            found.append(_object(schema))
        elif type == "number" or "number" not in types:
            found.append(_number(schema, integer=type == "integer"))
    return found


def _text(schema: Schema) -> Text:
    patterns = (schema["pattern"],) if "pattern" in schema else ()
    formats = (schema["format"],) if "format" in schema else ()
    return Text(schema.get("minLength", 0), schema.get("maxLength"), patterns, formats)


def _number(schema: Schema, *, integer: bool) -> Number:
    def bounds(plain: str, exclusive: str) -> tuple[Bound, ...]:
        names = ((plain, False), (exclusive, True))
        return tuple(Bound(decimal(schema[name]), strict) for name, strict in names if name in schema)

    multiples = (decimal(schema["multipleOf"]),) if "multipleOf" in schema else ()
    minima, maxima = bounds("minimum", "exclusiveMinimum"), bounds("maximum", "exclusiveMaximum")
    return Number(integer, minima, maxima, multiples)


def decimal(number: float) -> Decimal:
    """Its exact value, as it is written. Raises TooComplex for one of very many digits."""
    if isinstance(number, int) and abs(number) >= 10**400:
        raise TooComplex("a number of that many digits")
    return Decimal(number) if isinstance(number, int) else Decimal(repr(number))


def _array(schema: Schema) -> Array:
    first, items = schema.get("prefixItems", ()), schema.get("items", True)
    if isinstance(items, list):  # as before 2020-12
        first, items = items, schema.get("additionalItems", True)
    elif "additionalItems" in schema:
        first = ()
    return Array(schema.get("minItems", 0), schema.get("maxItems"), tuple(first), items)


def _object(schema: Schema) -> Object:
    return Object(
        schema.get("properties", {}),
        tuple(dict.fromkeys(schema.get("required", ()))),
        schema.get("additionalProperties", True),
        schema.get("patternProperties", {}),
        schema.get("minProperties", 0),
        schema.get("maxProperties"),
    )


def _exactly(value: Any) -> Value:
    if isinstance(value, list):
        return Array(len(value), len(value), tuple({"const": item} for item in value), False)
    if isinstance(value, dict):
        return Object(
            {name: {"const": item} for name, item in value.items()}, tuple(value), False, {}, 0, None
        )
    return Word(value)


def _meet(one: Value, other: Value) -> Value | None:
    """What both allow; None for nothing."""
    if isinstance(other, Word) and not isinstance(one, Word):
        one, other = other, one
    if isinstance(one, Word):
        return one if _allows(other, one.value) else None
    if isinstance(one, Text) and isinstance(other, Text):
        most = _least_of(one.most, other.most)
        patterns, formats = one.patterns + other.patterns, one.formats + other.formats
        return Text(max(one.least, other.least), most, _once(patterns), _once(formats))
    if isinstance(one, Number) and isinstance(other, Number):
        return Number(
            one.integer or other.integer,
            _once(one.minima + other.minima),
            _once(one.maxima + other.maxima),
            _once(one.multiples + other.multiples),
        )
    if isinstance(one, Array) and isinstance(other, Array):
        return _arrays(one, other)
    return _objects(one, other) if isinstance(one, Object) and isinstance(other, Object) else None


def _arrays(one: Array, other: Array) -> Array:
    first = [all_of([_item(one, n), _item(other, n)]) for n in range(max(len(one.first), len(other.first)))]
    least, most = max(one.least, other.least), _least_of(one.most, other.most)
    return Array(least, most, tuple(first), all_of([one.items, other.items]))


def _item(array: Array, n: int) -> Any:
    return array.first[n] if n < len(array.first) else array.items


def _objects(one: Object, other: Object) -> Object:
    if one.by_pattern or other.by_pattern:
        return _beside_patterns(one, other)
    properties = {
        name: all_of([found.properties.get(name, found.extra) for found in (one, other)])
        for name in {**one.properties, **other.properties}
    }
    return Object(
        properties,
        _once(one.required + other.required),
        all_of([one.extra, other.extra]),
        {},
        max(one.least, other.least),
        _least_of(one.most, other.most),
    )


def _beside_patterns(one: Object, other: Object) -> Object:
    if not (_open(one) or _open(other)):
        raise TooComplex("patternProperties beside another schema")
    kept, beside = (other, one) if _open(one) else (one, other)
    return msgspec.structs.replace(kept, required=_once(beside.required + kept.required))


def _open(found: Object) -> bool:
    """Does it ask for no more than that some names are there?"""
    asked = found.properties or found.by_pattern or found.least or found.most is not None
    return not asked and found.extra in (True, {})


def all_of(schemas: list[Any]) -> Any:
    """One schema that says what all say."""
    said: list[Any] = []
    for schema in schemas:
        if schema is False:
            return False
        if schema not in (True, {}) and not any(schema is other for other in said):
            said.append(schema)
    if len(said) < 2:
        return said[0] if said else True
    return {"allOf": said}


def _allows(value: Value, word: Any) -> bool:
    """Does it allow this null, boolean, number or string?"""
    if isinstance(value, Word):
        return (type(value.value) is type(word) and value.value == word) or (
            is_number(value.value) and is_number(word) and decimal(value.value) == decimal(word)
        )
    if isinstance(value, Text):
        return isinstance(word, str) and all(expr.matches(word) for expr in contents(value))
    if isinstance(value, Number) and is_number(word):
        number = plain(decimal(word))
        fits = all(expr.matches(number) for expr in numbers(value))
        return fits and is_multiple(number, value.multiples)
    return False


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_multiple(number: str, of: Iterable[Decimal]) -> bool:
    """Is the number, in decimal digits, a multiple of each?"""
    value = Decimal(number).as_integer_ratio()
    ratios = (divisor.as_integer_ratio() for divisor in of)
    return all(value[0] * bottom % (value[1] * top) == 0 for top, bottom in ratios)


def _least_of(one: int | None, other: int | None) -> int | None:
    limits = [limit for limit in (one, other) if limit is not None]
    return min(limits, default=None)


def _once(items: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


def contents(value: Text) -> list[Expr]:
    """What strings must match, by their characters."""
    exprs = [pattern(source) for source in value.patterns] + [format_expr(name) for name in value.formats]
    if value.least or value.most is not None or not exprs:
        exprs.append(repeat(ANY_CHARACTER, value.least, value.most))
    return exprs


def numbers(value: Number) -> tuple[Expr, ...]:
    """What its digits must match; `multiples` is more than they can say."""
    integer = value.integer
    bounds = [at_least(bound.value, strict=bound.strict, integer=integer) for bound in value.minima]
    bounds += [at_most(bound.value, strict=bound.strict, integer=integer) for bound in value.maxima]
    return tuple(bounds) or (ANY_INTEGER if integer else ANY_NUMBER,)
