"""JSON schemas as grammars can follow them: what none could hold an answer to is refused, by its place. Knows JSON
Schema (2020-12, and what older drafts write otherwise), and what llguidance makes of it; no requests.

llguidance refuses most of what it cannot enforce, without saying where; what it enforces less strictly than validators
ask for is made stricter here, or refused. docs/structured.md has the table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec
from msgspec import UNSET, UnsetType

from ringlm.errors import RequestError

MAX_DEPTH: Final = 32  # of schemas in schemas; llguidance reads 128 levels of JSON, of which one takes up to three
LARGEST: Final = 10**15  # of numbers that have no bound; every reader of JSON holds them

_ONE = {"items", "additionalItems", "additionalProperties"}  # keywords whose value is a schema
_LISTS = {"allOf", "anyOf", "oneOf", "prefixItems", "items"}  # a list of them
_NAMED = {"properties", "patternProperties", "$defs", "definitions"}  # some by name
_OTHERWISE = {"enum", "const", "$ref", "anyOf", "allOf", "oneOf"}  # keywords that may say what a number is
_REFUSED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("not", "if", "contains", "minContains", "maxContains", "propertyNames"), "cannot be enforced"),
    **dict.fromkeys(("dependencies", "dependentRequired", "dependentSchemas"), "cannot be enforced"),
    **dict.fromkeys(("unevaluatedItems", "unevaluatedProperties"), "cannot be enforced"),
    **dict.fromkeys(("$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor"), "is not resolved here"),
}

_DAY = r"(0[1-9]|1[0-9]|2[0-8])"
_LEAP = r"([0-9]{2}(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_YEAR = r"([0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = rf"({_YEAR}-((0[1-9]|1[0-2])-{_DAY}|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)|{_LEAP}-02-29)"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = r"[A-Za-z0-9]+(-[A-Za-z0-9]+)*"
# Days that exist, no leap seconds, no names of other alphabets: a part of the format, which no validator disputes.
_PATTERNS: Final[Mapping[str, Mapping[str, Any]]] = {
    "date": {"pattern": f"^{_DATE}$"},
    "time": {"pattern": f"^{_TIME}$"},
    "date-time": {"pattern": f"^{_DATE}T{_TIME}$"},
    "hostname": {"pattern": rf"^{_LABEL}(\.{_LABEL})*$", "maxLength": 63},
}
_FORMATS = {"duration", "email", "ipv4", "ipv6", "uri", "uuid"}  # which llguidance enforces
_FORMATS_LEFT = {
    *("idn-email", "idn-hostname", "iri", "iri-reference", "json-pointer", "regex", "relative-json-pointer"),
    *("uri-reference", "uri-template"),
}


class _Keywords(msgspec.Struct, rename={"defs": "$defs", "ref": "$ref"}):
    """Of what kind the values are of those that are looked at here."""

    type: str | list[str] | UnsetType = UNSET
    format: str | UnsetType = UNSET
    enum: list[Any] | UnsetType = UNSET
    required: list[str] | UnsetType = UNSET
    properties: dict[str, Any] | UnsetType = UNSET
    patternProperties: dict[str, Any] | UnsetType = UNSET
    defs: dict[str, Any] | UnsetType = UNSET
    definitions: dict[str, Any] | UnsetType = UNSET
    allOf: list[Any] | UnsetType = UNSET
    minProperties: int | UnsetType = UNSET


def check(schema: Mapping[str, Any], what: str, place: str = "#") -> None:
    """Raises RequestError for keywords whose values are of another kind than JSON Schema wants."""
    try:
        msgspec.convert(schema, _Keywords)
    except msgspec.ValidationError as error:
        raise RequestError(f"{what}, at {place}: {error}.") from None


def enforceable(schema: Any, what: str) -> dict[str, Any]:
    """A schema whose answers are of `schema`, all of which can be held to it. Raises RequestError that names `what` and
    the place in it."""
    if isinstance(schema, bool):
        schema = {} if schema else {"anyOf": []}
    if not isinstance(schema, Mapping):
        raise RequestError(f"{what} is {schema!r:.80}; it must be a JSON schema, an object.")
    made: dict[str, Any] = _Schemas(what).rewritten(schema, "#", 0)
    return made


def _bounded(made: dict[str, Any]) -> dict[str, Any]:
    """Without a bound of its own a number may be one that no reader of JSON holds, such as 1e999, or go on for ever."""
    kinds = made.get("type", "number")
    if made.keys() & _OTHERWISE or not {"number", "integer"} & set(kinds if isinstance(kinds, list) else [kinds]):
        return made
    low, high = (
        [value for key in keys if isinstance(value := made.get(key), int | float)]
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    if not low and max(high, default=0) > -LARGEST:
        made["minimum"] = -LARGEST
    if not high and min(low, default=0) < LARGEST:
        made["maximum"] = LARGEST
    return made


class _Schemas:
    def __init__(self, what: str) -> None:
        self._what = what

    def rewritten(self, schema: Any, place: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self._error(place, f"is {schema!r:.40}; a schema is an object, true or false")
        if depth > MAX_DEPTH:
            raise self._error(place, f"is nested more than {MAX_DEPTH} deep")
        check(schema, self._what, place)
        made: dict[str, Any] = {}
        for key, value in schema.items():
            at = f"{place}/{key}"
            if key in _REFUSED:
                raise self._error(at, f"'{key}' {_REFUSED[key]}")
            if key in _LISTS and isinstance(value, list):
                made[key] = [self.rewritten(each, f"{at}/{index}", depth + 1) for index, each in enumerate(value)]
            elif key in _ONE:
                made[key] = self.rewritten(value, at, depth + 1)
            elif key in _NAMED and isinstance(value, Mapping):
                made[key] = {name: self.rewritten(each, f"{at}/{name}", depth + 1) for name, each in value.items()}
            elif key == "uniqueItems":
                if value:
                    raise self._error(at, "'uniqueItems' cannot be enforced")
            elif key != "format":
                made[key] = value
        if made.get("minProperties", 0) > len(made.get("required", ())) + 1:
            # Keys that the schema does not name may come twice, and count once.
            raise self._error(f"{place}/minProperties", "can be enforced up to one more than are 'required'")
        return self._with_format(_bounded(made), schema.get("format"), place)

    def _with_format(self, made: dict[str, Any], format: Any, place: str) -> dict[str, Any]:
        """One that JSON Schema does not know says nothing."""
        if format in _FORMATS_LEFT:
            raise self._error(f"{place}/format", f"format '{format}' cannot be enforced")
        if format in _FORMATS:
            made["format"] = format
        elif format in _PATTERNS:
            made["allOf"] = [*made.get("allOf", ()), _PATTERNS[format]]
        return made

    def _error(self, place: str, why: str) -> RequestError:
        return RequestError(f"{self._what}, at {place}: {why}.")
