"""Hermes, Qwen 2.5 and 3, SmolLM3: <tool_call>{"name": "f", "arguments": {…}}</tool_call>, once for each call."""

from __future__ import annotations

from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import ToolFormat
from ringlm.frontend.tools.json_call import read_call
from ringlm.frontend.tools.reader import Reader, Steps


def _read(reader: Reader, calls: Calls) -> Steps[None]:
    yield from read_call(reader, calls)
    yield from reader.one_of("</tool_call>")  # some leave it out at the end


FORMAT = ToolFormat(_read, openings=("<tool_call>",), inner=("</tool_call>",))
