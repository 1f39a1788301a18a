"""Which schemas a grammar can enforce, keyword by keyword."""

from __future__ import annotations

import copy
import time
from typing import Any

import pytest

from deepseek_api_compat.errors import InvalidRequest
from deepseek_api_compat.protocol.json_schema import MOST_REPEATS, enforceable, part, resolve

STRING = {"type": "string"}
OBJECT = {"type": "object", "properties": {"a": STRING}, "required": ["a"]}


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ({"not": {}}, ".not"),
        ({"if": STRING, "then": {"minLength": 2}}, ".if"),
        ({"type": "object", "dependentSchemas": {"a": {}}}, ".dependentSchemas"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, ".dependentRequired"),
        ({"type": "object", "dependencies": {"a": ["b"]}}, ".dependencies"),
        ({"type": "object", "propertyNames": STRING}, ".propertyNames"),
        ({"type": "object", "unevaluatedProperties": False}, ".unevaluatedProperties"),
        ({"type": "array", "unevaluatedItems": False}, ".unevaluatedItems"),
        ({"type": "array", "uniqueItems": True}, ".uniqueItems"),
        ({"type": "array", "contains": STRING}, ".contains"),
        ({"type": "array", "minContains": 1}, ".minContains"),
        ({"$dynamicRef": "#a"}, ".$dynamicRef"),
        ({"$recursiveRef": "#"}, ".$recursiveRef"),
        ({"type": "string", "format": "uri"}, ".format"),
        ({"type": "string", "format": 5}, ".format"),
        ({"type": "string", "pattern": "(?=a)b"}, ".pattern"),
        ({"type": "string", "pattern": "(?<!a)b"}, ".pattern"),
        ({"type": "string", "pattern": r"(a)\1"}, ".pattern"),
        ({"type": "string", "pattern": r"\bword\b"}, ".pattern"),
        ({"type": "string", "pattern": "("}, ".pattern"),
        ({"type": "string", "pattern": 5}, ".pattern"),
        ({"type": "string", "pattern": "[[a]&&b]"}, ".pattern"),
        ({"type": "string", "pattern": "a" * 5000}, ".pattern"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, ".oneOf"),
        ({"oneOf": [{}, STRING]}, ".oneOf"),
        ({"oneOf": []}, ".oneOf"),
        ({"anyOf": []}, ".anyOf"),
        ({"anyOf": STRING}, ".anyOf"),
        ({"$ref": "https://example.com/schema.json"}, ".$ref"),
        ({"$ref": "#/nothing"}, ".$ref"),
        ({"$ref": "#"}, ".$ref"),
        ({"$ref": 5}, ".$ref"),
        ({"type": "any"}, ".type"),
        ({"type": []}, ".type"),
        ({"enum": []}, ".enum"),
        ({"type": "string", "enum": [1]}, ".enum"),
        ({"type": "string", "const": 1}, ".const"),
        ({"type": "string", "minLength": -1}, ".minLength"),
        ({"type": "string", "minLength": True}, ".minLength"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, ".minLength"),
        ({"type": "array", "maxItems": MOST_REPEATS + 1}, ".maxItems"),
        ({"type": "integer", "minimum": "1"}, ".minimum"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, ".minimum"),
        ({"type": "number", "minimum": 0, "exclusiveMinimum": True}, ".exclusiveMinimum"),
        ({"type": "integer", "multipleOf": 0}, ".multipleOf"),
        ({"type": "object", "properties": []}, ".properties"),
        ({"type": "object", "required": "a"}, ".required"),
        ({"properties": {"a": {"items": {"not": {}}}}}, ".properties.a.items.not"),
        ({"properties": {"a": 5}}, ".properties.a"),
        ({"prefixItems": [STRING, {"not": {}}]}, ".prefixItems[1].not"),
        ({"patternProperties": {"(?=a)": STRING}}, ".patternProperties"),
        ({"additionalProperties": {"not": {}}}, ".additionalProperties.not"),
        ({"anyOf": [STRING, {"not": {}}]}, ".anyOf[1].not"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"not": {}}}}, ".$defs.a.not"),
        ({"$ref": "#/components/a", "components": {"a": {"not": {}}}}, ".components.a.not"),
    ],
)
def test_what_can_not_be_enforced_is_named(schema: dict[str, Any], path: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        enforceable(schema, "response_format.json_schema.schema")
    assert caught.value.param == f"response_format.json_schema.schema{path}"
    assert path.removeprefix(".") in caught.value.message


@pytest.mark.parametrize(
    "schema",
    [
        {},
        {"type": ["string", "null"]},
        {"enum": ["ä", 1, None, True, 2.5, {"a": [1]}]},
        {"const": {"type": "nonsense", "not": "a keyword here"}},
        {"type": "object", "properties": {"not": STRING, "$ref": STRING}, "additionalProperties": False},
        {"type": "object", "patternProperties": {"^x-": STRING}, "additionalProperties": False},
        {"type": "object", "minProperties": 1, "maxProperties": 3},
        {"type": "array", "items": STRING, "minItems": 1, "maxItems": 9},
        {"type": "array", "prefixItems": [STRING, True], "items": False},
        {"type": "string", "pattern": r"^\p{L}+\\1(?<year>[0-9]{4})$", "minLength": 1},
        *({"type": "string", "format": name} for name in ("date-time", "date", "email", "ipv4", "uuid")),
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1e3, "multipleOf": 0.5},
        {"type": "integer", "maximum": -3},
        {"allOf": [OBJECT, {"required": ["b"]}]},
        {"oneOf": [STRING, {"type": "integer", "minimum": 1}]},
        {"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": STRING}},
        {"type": "string", "x-order": 1, "strict": True, "deprecated": False},
    ],
)
def test_what_can_be_enforced_stays_as_it_is(schema: dict[str, Any]) -> None:
    before = copy.deepcopy(schema)
    assert enforceable(schema, "p") == before
    assert schema == before


def test_keywords_that_ask_for_nothing_are_left_out() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.com/a",
        "x-guidance": {"lenient": True},
        "type": "array",
        "uniqueItems": False,
        "items": {"type": "string", "format": "password", "title": 5, "description": "d", "default": 1},
    }
    assert enforceable(schema, "p") == {"type": "array", "items": STRING}


def test_a_union_told_apart_by_a_constant_is_as_good_as_any_of() -> None:
    def shape(kind: str) -> dict[str, Any]:
        return {"type": "object", "properties": {"kind": {"const": kind}}, "required": ["kind"]}

    options = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
    enforceable({"oneOf": options, "$defs": {"a": shape("a"), "b": shape("b")}}, "p")
    with pytest.raises(InvalidRequest, match="may match several"):
        enforceable({"oneOf": options, "$defs": {"a": shape("a"), "b": shape("a")}}, "p")


def test_objects_that_declare_properties_have_no_others() -> None:
    closed = {**OBJECT, "additionalProperties": False}
    assert enforceable(OBJECT, "p") == closed
    assert enforceable({"type": "array", "items": OBJECT}, "p")["items"] == closed
    for open in ({"type": "object"}, {**OBJECT, "additionalProperties": True}, {**OBJECT, "required": ["b"]}):
        assert enforceable(open, "p") == open
    # Closed halves would exclude each other.
    both = {"allOf": [OBJECT, {"type": "object", "properties": {"b": STRING}}]}
    assert enforceable(both, "p") == both


def test_integers_without_bounds_get_some() -> None:
    assert enforceable({"type": "integer"}, "p")["maximum"] == 2**53 - 1
    assert enforceable({"type": "integer", "minimum": 2**60}, "p") == {"type": "integer", "minimum": 2**60}


def test_recursive_schema() -> None:
    tree = {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}}
    assert enforceable(tree, "p") == {**tree, "additionalProperties": False}
    looped: dict[str, Any] = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    assert resolve(looped, looped) == {"$ref": "#/$defs/a"}  # ends


def test_part_of_a_schema_keeps_its_references() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}
    root = {"properties": {"first": {"$ref": "#/$defs/node"}, "name": STRING}, "$defs": {"node": node}}
    assert part(root, root["properties"]["name"]) == STRING
    first = part(root, root["properties"]["first"])
    assert resolve(first, first)["properties"]["next"] == {"$ref": "#/$defs/root/$defs/node"}
    assert resolve({"$ref": "#/$defs/root/$defs/node"}, first) == resolve(first, first)
    assert enforceable(first, "p")


def test_a_check_is_quick() -> None:
    schema = {"type": "object", "properties": {f"p{i}": OBJECT for i in range(100)}}
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        enforceable(schema, "p")
        best = min(best, time.perf_counter() - start)
    assert best < 0.9  # 4 ms on an idle machine


def test_schemas_that_are_hard_to_compare_are_given_up() -> None:
    """Each level has ten times as many pairs as the one before."""
    levels: dict[str, Any] = {"9": {"type": "integer"}}
    for level in range(9):
        levels[str(level)] = {"anyOf": [{"$ref": f"#/$defs/{level + 1}"}] * 10}
    for options in ([{"$ref": "#/$defs/0"}, STRING], [{"$ref": "#/$defs/2"}, {"$ref": "#/$defs/3"}]):
        with pytest.raises(InvalidRequest, match="oneOf"):
            enforceable({"oneOf": options, "$defs": levels}, "p")


def test_a_long_chain_of_references() -> None:
    chain: dict[str, Any] = {str(i): {"items": {"$ref": f"#/$defs/{i + 1}"}} for i in range(5000)}
    with pytest.raises(InvalidRequest, match="too deep"):
        enforceable({"$ref": "#/$defs/0", "$defs": {**chain, "5000": STRING}}, "p")
