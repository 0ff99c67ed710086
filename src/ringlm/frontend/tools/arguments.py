"""A tool's arguments one by one, for formats that do not write them as one JSON object. Knows schemas, no formats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ringlm.errors import RequestError
from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.json_schema import check

ANNOTATIONS: Final = frozenset({"title", "description", "default", "examples", "deprecated", "$schema", "$comment"})
DEFINITIONS: Final = frozenset({"$defs", "definitions"})


class Argument(NamedTuple):
    """One of them; `schema` has the definitions of the whole."""

    name: str
    schema: Mapping[str, Any]
    required: bool


def arguments(schema: Mapping[str, Any], tool: str) -> list[Argument]:
    """In the order of the schema. Raises RequestError where it says more than what each of them is."""
    known = {"type", "properties", "required", "additionalProperties", *DEFINITIONS} | ANNOTATIONS
    properties, required = schema.get("properties", {}), schema.get("required", [])
    odd = [key for key in schema if key not in known] + [name for name in required if name not in properties]
    if odd:
        raise RequestError(
            f"the parameters of tool '{tool}': {odd[0]!r} cannot be enforced in this model's format, which writes each "
            "argument by itself; describe all in 'properties'."
        )
    shared = {key: schema[key] for key in DEFINITIONS if key in schema}
    found = []
    for name, each in properties.items():
        own = each if isinstance(each, Mapping) else {} if each is True else {"anyOf": []}
        check(own, f"argument '{name}' of tool '{tool}'")
        found.append(Argument(name, {**own, **shared}, name in required))
    return found


def separated(lark: Lark, written: Sequence[tuple[str, bool]], separator: str) -> str:
    """Grammars of arguments in their order, with the separator between; those that are not required, or not."""
    first, later = '""', '""'  # what follows when nothing has been written yet, and when something has
    for argument, required in reversed(written):
        whole = f"{argument} {later}"
        first = lark.rule(whole if required else f"{whole} | {first}")
        later = lark.rule(f"{literal(separator)} {whole}" + ("" if required else f" | {later}"))
    return first
