"""Gemma 4: <|tool_call>call:f{a:<|"|>text<|"|>,b:[1,true],c:{d:null}}<tool_call|> for each call.

It is JSON but for keys, which have no quotes, and for the words that stand for quotes. Texts stream.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps
from ringlm.frontend.tools.tagged import as_json, inside_json

_DEEPEST = 64
_KEY = re.compile(r"[^\s{}\[\],<>]+")


@dataclass(frozen=True)
class Gemma:
    """The format between these words."""

    opening: str
    quote: str
    closing: str

    def format(self) -> ToolFormat:
        return ToolFormat(self._read, openings=(self.opening,), inner=(self.quote, self.closing))

    def _read(self, reader: Reader, calls: Calls) -> Steps[None]:
        calls.begin()
        yield from reader.expect(self.opening)
        yield from reader.expect("call:")
        calls.name((yield from reader.expect(*calls.names)))
        yield from reader.expect("{")
        yield from self._read_object(reader, calls, 1)
        calls.end()
        yield from reader.one_of(self.closing)

    def _read_value(self, reader: Reader, calls: Calls, depth: int) -> Steps[None]:
        if depth > _DEEPEST:
            raise Broken
        opening = yield from reader.one_of(self.quote, "{", "[")
        if opening == "{":
            yield from self._read_object(reader, calls, depth + 1)
        elif opening == "[":
            yield from self._read_list(reader, calls, depth + 1)
        elif opening:
            calls.arguments('"')
            yield from reader.through(self.quote, lambda text: calls.arguments(inside_json(text)))
            calls.arguments('"')
        else:
            value: list[str] = []
            yield from reader.until((",", "}", "]"), value.append)
            calls.arguments(as_json("".join(value).strip()))

    def _read_object(self, reader: Reader, calls: Calls, depth: int) -> Steps[None]:
        separator = yield from reader.one_of("}")
        before = "{"
        while separator != "}":
            key: list[str] = []
            yield from reader.through(":", key.append)
            name = "".join(key).replace(self.quote, "").strip()
            if not _KEY.fullmatch(name):
                raise Broken
            calls.arguments(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            yield from self._read_value(reader, calls, depth)
            separator = yield from reader.expect(",", "}")
            before = ", "
        calls.arguments("{}" if before == "{" else "}")

    def _read_list(self, reader: Reader, calls: Calls, depth: int) -> Steps[None]:
        calls.arguments("[")
        separator = yield from reader.one_of("]")
        while separator != "]":
            yield from self._read_value(reader, calls, depth)
            separator = yield from reader.expect(",", "]")
            calls.arguments(", " if separator == "," else "")
        calls.arguments("]")


FORMAT = Gemma("<|tool_call>", '<|"|>', "<tool_call|>").format()
