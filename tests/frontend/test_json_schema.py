"""JSON schemas, as answers are held to them: what is refused says where, and what can be written is valid."""

from __future__ import annotations

import copy
import json
import random
from datetime import date
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from llguidance import LLMatcher, LLTokenizer

from benchmarks.schemas import make
from ringlm.errors import RequestError
from ringlm.frontend.grammar import MAX_CHARACTERS, Lark
from ringlm.frontend.json_schema import MAX_DEPTH, enforceable

BYTES = LLTokenizer("byte")


def accepts(schema: Any, *texts: str) -> list[bool]:
    """Which texts an answer of the schema may be."""
    lark = Lark({})
    matcher = LLMatcher(BYTES, lark.text(lark.json(schema, "it")), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    found = []
    for text in texts:
        matcher.reset()
        data = list(text.encode())
        found.append(matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting())
    return found


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        ({"not": {}}, "it, at #/not: 'not' cannot be enforced"),
        ({"properties": {"a": {"anyOf": [{}, {"if": {}}]}}}, "at #/properties/a/anyOf/1/if: 'if' cannot"),
        ({"$defs": {"b": {"items": {"uniqueItems": True}}}}, "at #/$defs/b/items/uniqueItems: 'uniqueItems' cannot"),
        ({"format": "regex"}, "at #/format: format 'regex' cannot be enforced"),
        ({"additionalProperties": {}, "minProperties": 2}, "at #/minProperties: can be enforced up to"),
        ({"properties": {"a": 5}}, "at #/properties/a: is 5; a schema is"),
        ({"type": 5}, "at #: Expected"),
        ({"required": "a"}, "at #: Expected"),
        ("no schema", "it is 'no schema'"),
    ],
)
def test_what_is_refused_says_where(schema: Any, why: str) -> None:
    with pytest.raises(RequestError) as refused:
        enforceable(schema, "it")
    assert why in str(refused.value)


def test_what_says_nothing_is_left_out() -> None:
    harmless = {"type": "string", "format": "password", "uniqueItems": False, "x-mine": [1]}
    assert enforceable(harmless, "it") == {"type": "string", "x-mine": [1]}
    assert accepts({"properties": {"not": {"const": 1}, "format": {}}}, '{"not": 1, "format": "regex"}') == [True]
    assert accepts(True, '"a"', "[1, {}]", "nul") == [True, True, False]


def test_how_deep_and_how_long() -> None:
    schema: Any = {}
    for _ in range(MAX_DEPTH):
        schema = {"items": schema}
    accepts(schema, "[]")
    with pytest.raises(RequestError, match="nested more than"):
        enforceable({"items": schema}, "it")
    lark = Lark({})
    with pytest.raises(RequestError, match="characters; at most"):
        lark.text(lark.json({"enum": ["a" * MAX_CHARACTERS]}, "it"))


def test_days_and_times_exist() -> None:
    draw = random.Random(0)
    days = [
        f"{y:04}-{m:02}-{d:02}" for y in (0, 1, 4, 100, 1900, 2000, 2023, 2024) for m in range(14) for d in range(33)
    ]
    days += [f"{draw.randint(0, 9999):04}-02-29" for _ in range(100)]

    def exists(day: str) -> bool:
        try:
            return bool(date.fromisoformat(day))
        except ValueError:
            return False

    assert accepts({"format": "date"}, *map(json.dumps, days)) == [exists(day) for day in days]
    moments = [f"2024-02-29T{time}" for time in ("23:59:59Z", "24:00:00Z", "23:59:60Z", "00:00:00.5+05:30", "00:00:00")]
    assert accepts({"format": "date-time"}, *map(json.dumps, moments)) == [True, False, False, True, False]


def test_numbers_without_bounds_have_some() -> None:
    assert accepts({"type": "number"}, "1e999", "123456789012345", "-0.5", "12345678901234567") == [
        False,
        True,
        True,
        False,
    ]
    assert accepts({"type": ["integer", "null"]}, "1" * 30, "null") == [False, True]
    assert accepts({"type": "integer", "minimum": 10**16}, str(10**17), "1") == [True, False]
    assert accepts({"type": "integer", "enum": [10**17]}, str(10**17)) == [True]


def test_white_space_ends() -> None:
    texts = ('{"a": 1}', '{\n  "a": 1\n}', '{"a":  1}', '{\n\n"a": 1}', "{" + "\n" + " " * 41 + "}")
    assert accepts({"type": "object"}, *texts) == [True, True, False, False, False]


@pytest.mark.parametrize("seed", range(60))
def test_damaged_schemas_are_refused_or_stay_sound(seed: int) -> None:
    """Anything in the place of anything: an error of the request's, or a schema that llguidance judges."""
    draw = random.Random(seed)
    schema: Any = copy.deepcopy(make(seed))
    places: list[tuple[Any, Any]] = []
    rest = [schema]
    while rest:
        node = rest.pop()
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                rest.append(node[key])
    for node, key in draw.sample(places, 2):
        node[key] = draw.choice([None, True, False, 5, -1.5, "x", [], [{}], {}, {"type": 5}, {"$ref": "#/x"}, ["a"]])
    lark = Lark({})
    try:
        text = lark.text(lark.json(schema, "it"))
    except RequestError:
        return
    matcher = LLMatcher(BYTES, text, log_level=0)
    assert matcher.is_error() == bool(matcher.get_error())


def test_the_schemas_of_the_benchmark_are_enforced() -> None:
    for seed in range(0, 300, 6):
        Draft202012Validator.check_schema(make(seed))
        accepts(make(seed))
