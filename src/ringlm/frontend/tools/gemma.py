"""Gemma 4: <|tool_call>call:f{a:<|"|>text<|"|>,b:[1,true],c:{d:null}}<tool_call|> for each call.

It is JSON but for keys, which have no quotes, and for the words that stand for quotes; JSON is read, too. Texts stream.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.arguments import ANNOTATIONS, DEFINITIONS, Argument, arguments, separated
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas, ToolFormat
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
        return ToolFormat(
            self._read,
            openings=(self.opening,),
            inner=(self.quote, self.closing),
            head=f"{self.opening}call:",
            grammar=self._grammar,
        )

    def _grammar(self, lark: Lark, tools: Schemas, several: bool) -> str:
        calls = []
        for name, schema in tools.items():
            written = [
                (self._argument(lark, argument, name), argument.required) for argument in arguments(schema, name)
            ]
            calls.append(f'{literal(f"{name}{{")} {separated(lark, written, ",")} "}}"')
        call = f"{lark.rule(' | '.join(calls))} {lark.words(self.closing)}"
        return f"{call} ({lark.words(f'{self.opening}call:')} {call})*" if several else call

    def _argument(self, lark: Lark, argument: Argument, tool: str) -> str:
        """Text as the format has it, anything else as JSON, which is read too."""
        if argument.schema.keys() - ANNOTATIONS - DEFINITIONS == {"type"} and argument.schema["type"] == "string":
            value = f"{lark.words(self.quote)} {lark.until(self.quote)}"
        else:
            value = lark.json(argument.schema, f"argument '{argument.name}' of tool '{tool}'")
        return f"{literal(f'{argument.name}:')} {value}"

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
        if not opening and (yield from reader.comes('"')):
            calls.arguments(json.dumps((yield from reader.string()), ensure_ascii=False))
        elif opening == "{":
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
            name = yield from self._read_key(reader)
            calls.arguments(f"{before}{json.dumps(name, ensure_ascii=False)}: ")
            yield from self._read_value(reader, calls, depth)
            separator = yield from reader.expect(",", "}")
            before = ", "
        calls.arguments("{}" if before == "{" else "}")

    def _read_key(self, reader: Reader) -> Steps[str]:
        if (yield from reader.comes('"')):
            name = yield from reader.string()
            yield from reader.expect(":")
            return name
        key: list[str] = []
        yield from reader.through(":", key.append)
        name = "".join(key).replace(self.quote, "").strip()
        if not _KEY.fullmatch(name):
            raise Broken
        return name

    def _read_list(self, reader: Reader, calls: Calls, depth: int) -> Steps[None]:
        calls.arguments("[")
        separator = yield from reader.one_of("]")
        while separator != "]":
            yield from self._read_value(reader, calls, depth)
            separator = yield from reader.expect(",", "]")
            calls.arguments(", " if separator == "," else "")
        calls.arguments("]")


FORMAT = Gemma("<|tool_call>", '<|"|>', "<tool_call|>").format()
