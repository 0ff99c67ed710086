"""Mistral: [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], in newer models [TOOL_CALLS]f[ARGS]{…} for each call.

Their templates take ids of nine letters and digits only.
"""

from __future__ import annotations

import secrets
import string

from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Schemas, ToolFormat
from ringlm.frontend.tools.json_call import json_calls, read_calls
from ringlm.frontend.tools.reader import Reader, Steps


def _read(reader: Reader, calls: Calls) -> Steps[None]:
    yield from reader.expect("[TOOL_CALLS]")
    if (yield from reader.comes("[")):
        yield from read_calls(reader, calls)
        return
    calls.begin()
    name = yield from reader.expect(*calls.names)
    if (yield from reader.expect("[ARGS]", "[CALL_ID]")) == "[CALL_ID]":
        yield from reader.through("[ARGS]", lambda _: None)  # the id is ours to choose
    calls.name(name)
    yield from reader.object(calls.arguments)
    calls.end()


def _new_id() -> str:
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


def _grammar(lark: Lark, tools: Schemas, several: bool) -> str:
    """In the newer way where the model has a token for it."""
    if not lark.is_special("[ARGS]"):
        return f'"[" {json_calls(lark, tools, several)} "]"'
    calls = (
        f"{literal(name)} {lark.words('[ARGS]')} {lark.json(schema, f'the parameters of tool {name!r}')}"
        for name, schema in tools.items()
    )
    call = lark.rule(" | ".join(calls))
    return f"{call} ({lark.words('[TOOL_CALLS]')} {call})*" if several else call


FORMAT = ToolFormat(
    _read,
    openings=("[TOOL_CALLS]",),
    inner=("[CALL_ID]", "[ARGS]"),
    new_id=_new_id,
    head="[TOOL_CALLS]",
    grammar=_grammar,
)
