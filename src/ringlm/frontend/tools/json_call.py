"""Calls as JSON objects, which several formats have inside: {"name": "f", "arguments": {…}}, in any order."""

from __future__ import annotations

import json

from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas
from ringlm.frontend.tools.reader import Broken, Reader, Steps

_KINDS = {
    "name": "name",
    "arguments": "arguments",
    "parameters": "arguments",
    "id": "id",
    "type": "type",
    "tool_name": "name",
    "tool_call_id": "id",  # Command R7B's
}


def read_calls(reader: Reader, calls: Calls) -> Steps[None]:
    """Read one or more, or a list of them."""
    listed = yield from reader.one_of("[")
    more: str | bool = True
    while more:
        yield from read_call(reader, calls)
        more = (yield from reader.expect(",", "]")) == "," if listed else (yield from reader.comes("{"))


def read_call(reader: Reader, calls: Calls) -> Steps[None]:
    """Read one; Broken at the first key that a call has not. An id of the model's own is left out."""
    calls.begin()
    yield from reader.expect("{")
    missing, separator = set(_KINDS.values()), ","
    while separator == ",":
        kind = _KINDS.get((yield from reader.string()), "")
        if kind not in missing:
            raise Broken
        missing.remove(kind)
        yield from reader.expect(":")
        if kind == "arguments":
            yield from reader.object(calls.arguments)
        elif kind == "name":
            calls.name((yield from reader.string()))
        else:
            yield from reader.string()
        separator = yield from reader.expect(",", "}")
    calls.end()


def json_call(lark: Lark, tools: Schemas, arguments: str = "arguments") -> str:
    """One, as a grammar, with the name first; `arguments` is the key of the others."""
    calls = []
    for name, schema in tools.items():
        before = literal(f'{{"name": {json.dumps(name)}, "{arguments}": ')
        calls.append(f'{before} {lark.json(schema, f"the parameters of tool {name!r}")} "}}"')
    return lark.rule(" | ".join(calls))


def json_calls(lark: Lark, tools: Schemas, several: bool) -> str:
    """What is between the brackets of a list of one, or `several`."""
    call = json_call(lark, tools)
    return f'{call} (", " {call})*' if several else call
