"""Calls as JSON objects, which several formats have inside: {"name": "f", "arguments": {…}}, in any order."""

from __future__ import annotations

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.reader import Broken, Reader, Steps

_KINDS = {"name": "name", "arguments": "arguments", "parameters": "arguments", "id": "id", "type": "type"}


def read_calls(reader: Reader, calls: Calls) -> Steps[None]:
    """Read one, or a list of them."""
    separator = yield from reader.one_of("[")
    if not separator:
        yield from read_call(reader, calls)
    while separator in ("[", ","):
        yield from read_call(reader, calls)
        separator = yield from reader.expect(",", "]")


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
