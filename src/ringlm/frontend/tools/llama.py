"""Llama 3.1 to 3.3: {"name": "f", "parameters": {…}}, the whole answer or after <|python_tag|>; ; between several."""

from __future__ import annotations

from ringlm.frontend.grammar import Lark
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas, ToolFormat
from ringlm.frontend.tools.json_call import json_call, read_call
from ringlm.frontend.tools.reader import Reader, Steps


def _read(reader: Reader, calls: Calls) -> Steps[None]:
    yield from reader.one_of("<|python_tag|>")
    yield from read_call(reader, calls)
    while (yield from reader.one_of(";")) or (yield from reader.comes("{")):
        yield from read_call(reader, calls)


def _grammar(lark: Lark, tools: Schemas, several: bool) -> str:
    call = json_call(lark, tools, "parameters")
    return f'{call} ("; " {call})*' if several else call


FORMAT = ToolFormat(_read, openings=("<|python_tag|>",), bare=True, grammar=_grammar, first="{")
