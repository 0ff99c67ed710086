"""Qwen3-Coder and 3.5: <tool_call><function=f><parameter=a>value</parameter>…</function></tool_call> for each call.

Values become JSON by the tool's schema. Those that are text stream; a line break next to their tags is not theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps, decoded

_END = "</parameter>"
_PYTHONS = {"True": "true", "False": "false", "None": "null"}


def _read(reader: Reader, calls: Calls) -> Steps[None]:
    calls.begin()
    yield from reader.one_of("<function=")  # some leave out the <tool_call> before it
    calls.name((yield from reader.expect(*calls.names)))
    yield from reader.expect(">")
    separator = "{"
    while (yield from reader.expect("<parameter=", "</function>")) == "<parameter=":
        key: list[str] = []
        yield from reader.through(">", key.append)
        name = "".join(key)
        calls.arguments(f"{separator}{json.dumps(name, ensure_ascii=False)}: ")
        yield from _read_value(reader, calls, calls.schema(name))
        separator = ", "
    calls.arguments("{}" if separator == "{" else "}")
    calls.end()
    yield from reader.one_of("</tool_call>")


def _read_value(reader: Reader, calls: Calls, schema: Mapping[str, Any]) -> Steps[None]:
    if _is_text(schema):
        calls.arguments('"')
        yield from reader.through(_END, _Text(calls).push)
        calls.arguments('"')
    else:
        value: list[str] = []
        yield from reader.through(_END, value.append)
        calls.arguments(_as_json("".join(value).strip()))


class _Text:
    """Tells a text in pieces, as the inside of a JSON string."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._begun = False
        self._held = ""

    def push(self, text: str) -> None:
        text = self._held + (text if self._begun else text.removeprefix("\n"))
        self._begun = True
        told = text.removesuffix("\n")
        self._held = text[len(told) :]
        self._calls.arguments(json.dumps(told, ensure_ascii=False)[1:-1])


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value is to be taken as it is written, as it is where the schema says nothing."""
    kinds = schema.get("type", None if "anyOf" in schema else "string")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def _as_json(value: str) -> str:
    value = _PYTHONS.get(value, value)
    try:
        decoded(value)
    except Broken:
        return json.dumps(value, ensure_ascii=False)
    return value


FORMAT = ToolFormat(_read, openings=("<tool_call>", "<function="), inner=("</tool_call>", "</function>"))
