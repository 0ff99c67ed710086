"""Gemma 3 by templates that ask for it: ```tool_code, Python's calls, one a line, which may be printed, and ```."""

from __future__ import annotations

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import ToolFormat
from ringlm.frontend.tools.pythonic import read_call
from ringlm.frontend.tools.reader import Reader, Steps


def _read(reader: Reader, calls: Calls) -> Steps[None]:
    yield from reader.expect("```tool_code")
    while True:
        printed = yield from reader.one_of("print(")
        yield from reader.one_of("default_api.")
        yield from read_call(reader, calls, ")" if printed else "")
        if (yield from reader.one_of("```")) or (yield from reader.over()):
            break


FORMAT = ToolFormat(_read, openings=("```tool_code",))
