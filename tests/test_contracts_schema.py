"""The documented schema of ``SendEmail``: it is the one that is checked, and it leaves no value without a limit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import pytest

import contracts

ROOT = Path(__file__).resolve().parent.parent


def test_the_documented_schema_is_the_one_that_is_checked() -> None:
    documented = (ROOT / "docs" / "send-email.schema.json").read_bytes()
    assert documented == contracts.json_schema(), "run: python -m contracts > docs/send-email.schema.json"


def test_the_schema_names_every_field_and_forbids_others() -> None:
    schema = orjson.loads(contracts.json_schema())
    assert schema["properties"].keys() == {
        field.alias or name for name, field in contracts.SendEmail.model_fields.items()
    }
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == {"from", "body"}


def unbounded(schema: dict[str, Any], place: str) -> Iterator[str]:
    """Yield the places of a schema that take a value of any size."""
    wanted: dict[str, set[str]] = {"string": {"maxLength"}, "array": {"maxItems"}, "object": {"additionalProperties"}}
    wanted |= {"integer": {"minimum", "maximum"}, "number": {"minimum", "maximum"}}
    if not schema.keys() & {"enum", "format", "anyOf", "$ref"}:
        missing = wanted.get(schema["type"], set()) - schema.keys()
        yield from (f"{place}: {name}" for name in missing)
    if schema.get("additionalProperties"):
        yield f"{place}: additionalProperties"
    if "patternProperties" in schema and not ("maxProperties" in schema and "maxLength" in schema["propertyNames"]):
        yield f"{place}: maxProperties"
    inner = {**schema.get("properties", {}), **schema.get("patternProperties", {}), **schema.get("$defs", {})}
    inner |= {f"[{number}]": each for number, each in enumerate(schema.get("anyOf", []))}
    if "items" in schema:
        inner["[]"] = schema["items"]
    for name, each in inner.items():
        yield from unbounded(each, f"{place}.{name}")


def test_the_schema_bounds_every_value() -> None:
    assert list(unbounded(orjson.loads(contracts.json_schema()), "SendEmail")) == []


@pytest.mark.parametrize(
    "hole",
    [
        {"type": "string"},
        {"type": "array", "items": {"type": "null"}},
        {"type": "array", "maxItems": 1, "items": {"type": "integer", "minimum": 0}},
        {"type": "object", "properties": {}},
        {"type": "object", "additionalProperties": {"type": "null"}},
        {"anyOf": [{"type": "null"}, {"type": "number", "maximum": 1}]},
    ],
)
def test_a_hole_in_the_schema_would_be_found(hole: dict[str, Any]) -> None:
    assert len(list(unbounded({"type": "object", "additionalProperties": False, "properties": {"a": hole}}, ""))) == 1


def test_the_schema_says_in_words_what_it_cannot_say_otherwise() -> None:
    schema = orjson.loads(contracts.json_schema())
    assert f"{contracts.MAX_DELIVERY_BYTES} bytes" in schema["description"]
    assert f"{contracts.MAX_RECIPIENTS} recipients" in schema["description"]
    assert f"{contracts.MAX_BODY_BYTES} bytes" in schema["$defs"]["Body"]["properties"]["content"]["description"]
    assert "54400 characters in all" in schema["properties"]["metadata"]["description"]
