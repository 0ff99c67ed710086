"""Arguments that stand in tags of their own, which become the JSON object that callers get. Knows no whole calls.

Values become JSON by the tool's schema, or as their tags say. Those that are text stream.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from ringlm.errors import RequestError
from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.arguments import ANNOTATIONS, Argument, arguments
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.reader import Broken, Reader, Steps, decoded

_PYTHONS = {"True": "true", "False": "false", "None": "null"}


class Tags(NamedTuple):
    """What is before the name of an argument, right after it, before its value, and after that.

    With `kinds` it is said before the value whether that is text: true or false. With `own_lines` a line break next to
    the value is not the value's. In `exact` are the first four, white space included.
    """

    before: str
    after_name: str
    before_value: tuple[str, ...]
    after: str
    kinds: bool = False
    own_lines: bool = False
    exact: tuple[str, str, str, str] = ("", "", "", "")

    def words(self) -> tuple[str, ...]:
        return (self.before, self.after_name, *self.before_value, self.after)

    def read(self, reader: Reader, calls: Calls, end: str) -> Steps[None]:
        """All arguments of a call, and the `end` that comes after them."""
        separator = "{"
        while (yield from reader.expect(self.before, end)) == self.before:
            key: list[str] = []
            yield from reader.through(self.after_name, key.append)
            name = "".join(key).strip()
            is_text = _is_text(calls.schema(name))
            if self.kinds:
                is_text = (yield from reader.expect("true", "false")) == "true"
            yield from reader.in_turn(self.before_value)
            calls.arguments(f"{separator}{json.dumps(name, ensure_ascii=False)}: ")
            yield from self._read_value(reader, calls, is_text)
            separator = ", "
        calls.arguments("{}" if separator == "{" else "}")

    def grammar(self, lark: Lark, schema: Mapping[str, Any], tool: str, separator: str) -> str:
        """All arguments of a call in their order, the optional ones or not, as they are read."""
        written: list[str] = []
        for argument in arguments(schema, tool):
            is_text, value = self._value_grammar(lark, argument, f"argument '{argument.name}' of tool '{tool}'")
            before, middle, before_value, _ = self.exact
            start = lark.words(before) + " " + literal(argument.name) + " " + lark.words(middle)
            if self.kinds:
                start += f' "{"true" if is_text else "false"}" {lark.words(before_value)}'
            whole = f"{'' if not written else literal(separator)} {start} {value}"
            written.append(whole if argument.required else f"({whole})?")
        return " ".join(written)

    def _value_grammar(self, lark: Lark, argument: Argument, what: str) -> tuple[bool, str]:
        """Whether a value is text, and what it is, with what comes after it."""
        schema, end = argument.schema, lark.words(self.exact[3])
        allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
        odd = schema.keys() - {"type", "enum", "const", "$defs", "definitions"} - ANNOTATIONS
        texts = [each for each in allowed or () if isinstance(each, str)]
        if not _is_text(schema) or (self.kinds and (odd or (allowed and not texts))):
            return False, f"{lark.json(schema, what)} {end}"
        if odd:
            raise RequestError(
                f"{what}: {min(odd)!r} cannot be enforced in this model's format, where text is no JSON."
            )
        if allowed is None:
            return True, lark.until(self.after)
        if not texts:
            raise RequestError(f"{what}: what is no text needs its 'type' in this model's format.")
        return True, f"({' | '.join(map(literal, texts))}) {end}"

    def _read_value(self, reader: Reader, calls: Calls, is_text: bool) -> Steps[None]:
        if is_text:
            calls.arguments('"')
            yield from reader.through(self.after, _Text(calls, "\n" if self.own_lines else "").push)
            calls.arguments('"')
        else:
            value: list[str] = []
            yield from reader.through(self.after, value.append)
            calls.arguments(as_json("".join(value).strip()))


class _Text:
    """Tells a text in pieces, as the inside of a JSON string, without one `line_break` at its start and its end."""

    def __init__(self, calls: Calls, line_break: str) -> None:
        self._calls = calls
        self._line_break = line_break
        self._begun = False
        self._held = ""

    def push(self, text: str) -> None:
        text = self._held + (text if self._begun else text.removeprefix(self._line_break))
        self._begun = True
        told = text.removesuffix(self._line_break)
        self._held = text[len(told) :]
        self._calls.arguments(inside_json(told))


def _is_text(schema: Mapping[str, Any]) -> bool:
    """Whether a value is to be taken as it is written, as it is where the schema says nothing."""
    kinds = schema.get("type", None if "anyOf" in schema else "string")
    return "string" in (kinds if isinstance(kinds, list) else [kinds])


def inside_json(text: str) -> str:
    """A piece of a text as it is written in a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def as_json(value: str) -> str:
    """A value as JSON: itself if it is that, or Python's, else as a text."""
    value = _PYTHONS.get(value, value)
    try:
        decoded(value)
    except Broken:
        return json.dumps(value, ensure_ascii=False)
    return value
