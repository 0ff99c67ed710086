"""Llama 3.2, Gemma 3 and others by templates that ask for it: [f(a=1, b="x"), g()], the whole answer.

A call's arguments come as JSON, once it is whole.
"""

from __future__ import annotations

import ast
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps

_JSON_NAMES = {"true": True, "false": False, "null": None}  # which models mix up with Python's


def between(opening: str, closing: str = "") -> ToolFormat:
    """The format of lists of calls between these words; with one alone also of a list that is the whole answer."""

    def read(reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.one_of(opening)
        yield from reader.expect("[")
        separator = ","
        while separator == ",":
            yield from read_call(reader, calls)
            separator = yield from reader.expect(",", "]")
        yield from reader.one_of(closing)

    def write(calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        written = (
            f"{name}({', '.join(f'{key}={value!r}' for key, value in values.items())})" for name, values in calls
        )
        return f"{opening if closing else ''}[{', '.join(written)}]{closing}"

    return ToolFormat(read, (opening,), inner=(closing,) if closing else (), bare=not closing, write=write)


def read_call(reader: Reader, calls: Calls, end: str = "") -> Steps[None]:
    """Read one, and the `end` that must come after it. Raises Broken."""
    calls.begin()
    calls.name((yield from reader.expect(*calls.names)))
    if not (yield from reader.comes("(")):
        raise Broken
    source: list[str] = []
    yield from reader.enclosed("'\"", source.append)
    arguments = _as_json("".join(source))
    if end:
        yield from reader.expect(end)
    calls.arguments(arguments)
    calls.end()


def _as_json(arguments: str) -> str:
    """Of `(a=1, b="x")`. Raises Broken for anything but keywords and literals."""
    try:
        call = ast.parse(f"_{arguments.lstrip()}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Broken from None
    if not isinstance(call, ast.Call) or call.args or not all(keyword.arg for keyword in call.keywords):
        raise Broken
    values = {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    return json.dumps(values, ensure_ascii=False)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in _JSON_NAMES:
        return _JSON_NAMES[node.id]
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {_key(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        raise Broken from None
    if isinstance(value, str | int | None) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise Broken


def _key(node: ast.expr | None) -> str:
    if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
        raise Broken
    return node.value


FORMAT = between("<|python_tag|>")
