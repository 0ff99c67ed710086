"""A tool's arguments one by one, for formats that do not write them as one JSON object. Knows schemas, no formats."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from ringlm.errors import RequestError
from ringlm.frontend.json_schema import check

ANNOTATIONS: Final = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$comment"})
_DEFINITIONS: Final = ("$defs", "definitions")


class Argument(NamedTuple):
    """One of them; `schema` has the definitions of the whole."""

    name: str
    schema: Mapping[str, Any]
    required: bool


def arguments(schema: Mapping[str, Any], tool: str) -> list[Argument]:
    """In the order of the schema. Raises RequestError where it says more than what each of them is."""
    known = {"type", "properties", "required", "additionalProperties", *_DEFINITIONS} | ANNOTATIONS
    properties, required = schema.get("properties", {}), schema.get("required", [])
    odd = [key for key in schema if key not in known] + [name for name in required if name not in properties]
    if odd:
        raise RequestError(
            f"the parameters of tool '{tool}': {odd[0]!r} cannot be enforced in this model's format, which writes each "
            "argument by itself; describe all in 'properties'."
        )
    shared = {key: schema[key] for key in _DEFINITIONS if key in schema}
    found = []
    for name, each in properties.items():
        own = each if isinstance(each, Mapping) else {} if each is True else {"anyOf": []}
        check(own, f"argument '{name}' of tool '{tool}'")
        found.append(Argument(name, {**own, **shared}, name in required))
    return found
