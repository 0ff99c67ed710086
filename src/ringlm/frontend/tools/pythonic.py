"""Llama 3.2, Gemma 3 and others by templates that ask for it: [f(a=1, b="x"), g()], the whole answer.

A call's arguments come as JSON, once it is whole.
"""

from __future__ import annotations

import ast
import json
import keyword
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ringlm.errors import RequestError
from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.arguments import arguments, separated
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas, ToolFormat
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

    def grammar(lark: Lark, tools: Schemas, several: bool) -> str:
        call = call_grammar(lark, tools)
        more = f'(", " {call})*' if several else ""
        return f'"[" {call} {more} "]" {lark.words(closing)}'

    inner, head = ((closing,), opening) if closing else ((), "")
    return ToolFormat(read, (opening,), inner, not closing, write=write, head=head, grammar=grammar, first="[")


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


def call_grammar(lark: Lark, tools: Schemas) -> str:
    """One call, as a grammar."""
    calls = (f'{literal(f"{name}(")} {_keywords(lark, schema, name)} ")"' for name, schema in tools.items())
    return lark.rule(" | ".join(calls))


def _keywords(lark: Lark, schema: Mapping[str, Any], tool: str) -> str:
    """Arguments in their order; values as JSON, which is read."""
    written = []
    for argument in arguments(schema, tool):
        if not argument.name.isidentifier() or keyword.iskeyword(argument.name):
            raise RequestError(
                f"the parameters of tool '{tool}': {argument.name!r} is no name in Python, but this model writes it so."
            )
        value = lark.json(argument.schema, f"argument '{argument.name}' of tool '{tool}'")
        written.append((f"{literal(f'{argument.name}=')} {value}", argument.required))
    return separated(lark, written, ", ")


def _as_json(arguments: str) -> str:
    """Of `(a=1, b="x")`. Raises Broken for anything but keywords and literals."""
    try:
        call = ast.parse(f"_{arguments.lstrip()}", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise Broken from None
    if not isinstance(call, ast.Call) or call.args or not all(each.arg for each in call.keywords):
        raise Broken
    values = {str(each.arg): _value(each.value) for each in call.keywords}
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
