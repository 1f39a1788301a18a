"""The JSON texts that a schema allows, taken apart one level at a time.

A value becomes the grammar of its texts: an object is its braces, names and separators around the schemas of
its properties, and so on. They are written as by llguidance (its `json/compiler.rs`), for the rest of a text
must fit what the engine made of the part before.
"""

from __future__ import annotations

import json
from typing import Any

import msgspec

from deepseek_api_compat.protocol.grammar import Grammar, Json, OneOf, Pattern, Repeat, Seq, text
from deepseek_api_compat.protocol.json_numbers import plain
from deepseek_api_compat.protocol.json_schema import Schema, pointed
from deepseek_api_compat.protocol.json_values import (
    Array,
    JsonValues,
    Number,
    Object,
    Text,
    TooComplex,
    Value,
    Word,
    all_of,
    contents,
    decimal,
    is_number,
    numbers,
)
from deepseek_api_compat.protocol.regular import (
    ANY_CHARACTER,
    NOTHING,
    Expr,
    Ranges,
    any_of,
    literal,
    mapped,
    one_of,
    outside,
    repeat,
    sequence,
)
from deepseek_api_compat.protocol.regular_syntax import pattern, written_as

ITEM_SEPARATOR = ", "
KEY_SEPARATOR = ": "

_INLINE = 32  # parts of a sequence, so that it need not be copied for each beginning
_CONTROLS = (*range(0x20), 0x7F)
_ESCAPED: Ranges = ((0, 0x1F), (0x22, 0x22), (0x5C, 0x5C), (0x7F, 0x7F))
_SHORT = {"\n": "n", "\r": "r", "\b": "b", "\t": "t", "\f": "f", "\\": "\\", '"': '"'}
_QUOTE = literal('"')
_HEX = {digit: sorted({digit, digit.upper()}) for digit in "0123456789abcdef"}
# A name that is told from others may have any escape, as llguidance has it.
_ANY_NAME = written_as(r'"(?:[^"\\\x00-\x1f\x7f]|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*"')


class JsonTexts:
    """The texts of the schemas in `root`, to which their references point."""

    def __init__(self, root: Schema) -> None:
        self._root = root
        self.values = JsonValues(root)

    def grammar(self, value: Value) -> Grammar:
        """The texts of a value; its parts are `Json`. A number's `multiples` are left out."""
        if isinstance(value, Word):
            return _written(value.value)
        if isinstance(value, Text):
            return Pattern(tuple(sequence(_QUOTE, expr, _QUOTE) for expr in _strings(value)))
        if isinstance(value, Number):
            return Pattern(numbers(value))
        if isinstance(value, Array):
            return self._array(value)
        return self._object(value)

    def _part(self, schema: Any) -> Grammar:
        return Json(schema if isinstance(schema, dict) else {}, self._root)

    def _possible(self, schema: Any) -> bool:
        return schema is not False and bool(self.values.of(schema))

    def _array(self, array: Array) -> Grammar:
        first = [*array.first][: array.most]
        more = self._possible(array.items)
        for n, schema in enumerate(first):
            if not self._possible(schema):
                first, more = first[:n], False
                break
        least = max(array.least - len(first), 0)
        most = 0 if not more else None if array.most is None else array.most - len(first)
        if not more and least:
            return OneOf(())
        items = self._items(first, array.least, _Rest(self._part(array.items), least, most))
        return Seq((text("["), items, text("]")))

    def _items(self, first: list[Any], least: int, others: _Rest) -> Grammar:
        """The items of an array: each with its separator, those that must be and those that may."""
        separator = text(ITEM_SEPARATOR)
        tail = others.behind()
        if not first:
            return others.alone()
        for n in range(len(first) - 1, 0, -1):
            tail = (separator, self._part(first[n]), *tail)
            if n >= least:
                tail = (Repeat(Seq(tail), 1),)
            elif len(tail) > _INLINE:
                tail = (Seq(tail),)
        whole = Seq((self._part(first[0]), *tail))
        return whole if least else Repeat(whole, 1)

    def _object(self, found: Object) -> Grammar:
        members: list[tuple[Grammar, bool]] = []
        required = {*found.required}
        names = [*found.properties, *(name for name in found.required if name not in found.properties)]
        for name in names:
            schema = self._property(found, name)
            if self._possible(schema):
                must = name in required
                members.append((Seq((text(_name(name) + KEY_SEPARATOR), self._part(schema))), must))
            elif name in required:
                return OneOf(())
        extras = self._extras(found, names)
        if found.least or found.most is not None:
            if not all(must for _, must in members):
                raise TooComplex("a count of properties where some may be left out")
            most = None if found.most is None else found.most - len(members)
            if most is not None and most < 0:
                return OneOf(())
            rest = _Rest(extras, max(found.least - len(members), 0), most)
        else:
            rest = _Rest(extras, 0, None)
        return Seq((text("{"), _members(members, rest), text("}")))

    def _property(self, found: Object, name: str) -> Any:
        """The schema of a property, together with those of patterns that its name matches."""
        schemas = [schema for source, schema in found.by_pattern.items() if pattern(source).matches(name)]
        if name in found.properties:
            schemas.insert(0, found.properties[name])
        return all_of(schemas) if schemas else found.extra

    def _extras(self, found: Object, names: list[str]) -> Grammar | None:
        """A property of another name; None if there is none."""
        taken = one_of([literal(_name(name)) for name in names])
        by_pattern = {source: _string(pattern(source)) for source in found.by_pattern}
        options: list[Grammar] = []
        for source, name in by_pattern.items():
            schema = found.by_pattern[source]
            if self._possible(schema):
                options.append(self._member(Pattern((name,), _but(taken)), schema))
        if self._possible(found.extra):
            others = one_of([taken, *by_pattern.values()])
            name = _string(repeat(ANY_CHARACTER)) if not _but(others) else _ANY_NAME
            options.append(self._member(Pattern((name,), _but(others)), found.extra))
        return OneOf(tuple(options)) if options else None

    def _member(self, name: Grammar, schema: Any) -> Grammar:
        return Seq((name, text(KEY_SEPARATOR), self._part(schema)))


class _Rest(msgspec.Struct):
    """Any number of the same, after what is there already or at the beginning."""

    item: Grammar | None
    least: int
    most: int | None

    def behind(self, without: int = 0) -> tuple[Grammar, ...]:
        """Each with its separator; `without` of them have been."""
        most = None if self.most is None else self.most - without
        if self.item is None or most == 0:
            return ()
        item = Seq((text(ITEM_SEPARATOR), self.item))
        return (Repeat(item, most, max(self.least - without, 0)),)

    def alone(self) -> Grammar:
        if self.item is None or self.most == 0:
            return Seq(())
        whole = Seq((self.item, *self.behind(1)))
        return whole if self.least else Repeat(whole, 1)


def _members(members: list[tuple[Grammar, bool]], rest: _Rest) -> Grammar:
    """What is between the braces: one member without a separator in front, then the others that follow."""
    options: list[Grammar] = [rest.alone()]
    behind = rest.behind()
    for member, must in reversed(members):
        if must:
            options = []
        options.append(Seq((member, *behind)))
        separated = Seq((text(ITEM_SEPARATOR), member))
        behind = (separated if must else Repeat(separated, 1), *behind)
        if len(behind) > _INLINE:
            behind = (Seq(behind),)  # one object, which the options share
    return OneOf(tuple(reversed(options)))


def standalone(schema: Schema, root: Schema) -> Schema:
    """A schema out of `root` as one of its own: with what its references point to, and theirs."""
    names: dict[str, str] = {}
    targets: dict[str, Any] = {}
    whole = _moved(schema, names)
    while len(targets) < len(names):
        for reference in [*names][len(targets) :]:
            targets[names[reference]] = _moved(pointed(root, reference), names)
    return {**whole, "$defs": targets} if targets else whole


def _moved(schema: Any, names: dict[str, str]) -> Any:
    """A copy whose references lead to `$defs`, by the names given to them there."""
    if isinstance(schema, list):
        return [_moved(item, names) for item in schema]
    if not isinstance(schema, dict):
        return schema
    copy: Schema = {}
    for keyword, said in schema.items():
        if keyword in ("$defs", "definitions"):
            continue
        if keyword == "$ref":
            copy[keyword] = "#/$defs/" + names.setdefault(said, str(len(names)))
        elif keyword in ("properties", "patternProperties"):
            copy[keyword] = {name: _moved(part, names) for name, part in said.items()}
        else:
            copy[keyword] = said if keyword in ("enum", "const") else _moved(said, names)
    return copy


def _but(taken: Expr) -> tuple[Expr, ...]:
    return () if taken is NOTHING else (taken,)


def _name(name: str) -> str:
    return json.dumps(name, ensure_ascii=False)


def _written(value: Any) -> Grammar:
    if is_number(value):
        return text(plain(decimal(value)))
    if isinstance(value, str) and any(ord(character) in _CONTROLS for character in value):
        return Pattern((_string(literal(value)),))
    return text(json.dumps(value, ensure_ascii=False))


def _strings(value: Text) -> list[Expr]:
    """What must match between the quotes."""
    return [mapped(expr, _escaped) for expr in contents(value)]


def _string(content: Expr) -> Expr:
    return sequence(_QUOTE, mapped(content, _escaped), _QUOTE)


def _escaped(ranges: Ranges) -> Expr:
    """How llguidance writes the characters in a string: as they are, or escaped where JSON wants it."""
    inside = [any_of(outside((*outside(ranges), *_ESCAPED)))]
    codes = [code for code in (*_CONTROLS, 0x22, 0x5C) if any(low <= code <= high for low, high in ranges)]
    short = [ord(_SHORT[chr(code)]) for code in codes if chr(code) in _SHORT]
    inside.append(sequence(literal("\\"), any_of((code, code) for code in short)))
    for high in "017":
        low = [f"{code:02x}"[1] for code in codes if code in _CONTROLS and f"{code:02x}"[0] == high]
        digits = any_of((ord(form), ord(form)) for digit in low for form in _HEX[digit])
        inside.append(sequence(literal(f"\\u00{high}"), digits))
    return one_of(inside)
