"""Gemma 3 and 3n by templates that ask for it: ```tool_code, Python's calls, one a line, maybe printed, and ```."""

from __future__ import annotations

from ringlm.frontend.grammar import Lark
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas, ToolFormat
from ringlm.frontend.tools.pythonic import call_grammar, read_call
from ringlm.frontend.tools.reader import Reader, Steps


def lines(opening: str, closing: str) -> ToolFormat:
    """The format of calls between these words, one a line."""

    def read(reader: Reader, calls: Calls) -> Steps[None]:
        yield from reader.expect(opening)
        ended: str | bool = False
        while not ended:
            printed = yield from reader.one_of("print(")
            yield from reader.one_of("default_api.")
            yield from read_call(reader, calls, ")" if printed else "")
            ended = (yield from reader.one_of(closing)) or (yield from reader.over())

    def grammar(lark: Lark, tools: Schemas, several: bool) -> str:
        call = call_grammar(lark, tools)
        more = f'("\\n" {call})*' if several else ""
        return f"{call} {more} {lark.words(end)}"

    end = f"\n{closing}"
    return ToolFormat(read, (opening,), (closing,), head=f"{opening}\n", grammar=grammar)


FORMAT = lines("```tool_code", "```")
