"""GPT-OSS: <|channel|>commentary to=functions.f <|constrain|>json<|message|>{…}<|call|>, each call a message.

All of an answer is such messages: those of the channel analysis are reasoning, the others without a recipient text.
The prompt ends in what begins the first one.
"""

from __future__ import annotations

from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.formats import Reasoning, Schemas, ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps
from ringlm.frontend.tools.told import Told

_CHANNELS = ("analysis", "commentary", "final")
_BEGINS = ("<|start|>", "<|channel|>")
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
_RECIPIENT = "to=functions."
_HEADER = (*_BEGINS, "assistant", *_CHANNELS, _RECIPIENT, "<|constrain|>", "json", "JSON", "code", "<|message|>")


def _read(reader: Reader, told: Told) -> Steps[None]:
    channel = name = ""
    while (word := (yield from reader.expect(*_HEADER))) != "<|message|>":
        if word == _RECIPIENT:
            name = yield from reader.expect(*told.names)
        elif word in _CHANNELS:
            channel = word
    if name:
        told.begin()
        told.name(name)
        yield from reader.object(told.arguments)
        told.end()
    elif channel:
        yield from reader.until((*_ENDS, *_BEGINS), told.reason if channel == "analysis" else told.say)
    else:
        raise Broken
    yield from reader.one_of(*_ENDS)


def _grammar(lark: Lark, tools: Schemas, several: bool) -> str:
    """One, since it ends the answer."""
    calls = (
        f"{literal(name)} {lark.words(' <|constrain|>json<|message|>')} "
        f"{lark.json(schema, f'the parameters of tool {name!r}')}"
        for name, schema in tools.items()
    )
    return lark.rule(" | ".join(calls))


FORMAT = ToolFormat(
    _read,
    openings=(*_BEGINS, _RECIPIENT),
    inner=(*_ENDS, "<|constrain|>", "<|message|>"),
    bare=True,
    frames=True,
    head=f"<|channel|>commentary {_RECIPIENT}",
    grammar=_grammar,
    thoughts=Reasoning("<|channel|>analysis<|message|>", "<|end|><|start|>assistant"),
    response="<|channel|>final<|message|>",
)
