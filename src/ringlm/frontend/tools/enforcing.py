"""Answers that are calls of tools, or have such in them, as a grammar. Knows what formats say of themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from ringlm.errors import RequestError
from ringlm.frontend.conversation import Tool, schemas
from ringlm.frontend.grammar import Lark
from ringlm.frontend.json_schema import check
from ringlm.frontend.tools.formats import ToolFormat

_ANY_OBJECT: Final[Mapping[str, Any]] = {"type": "object"}


class Choice(NamedTuple):
    """What is asked of an answer's calls: `required`, or only allowed; of the tool `name`, or of any; at most one, or
    `several`."""

    required: bool = False
    name: str | None = None
    several: bool = True

    @classmethod
    def of(cls, tool_choice: str | Mapping[str, Any], several: bool = True) -> Choice:
        """Of OpenAI's `tool_choice`, other than 'none'. Raises RequestError."""
        match tool_choice:
            case "auto":
                return cls(several=several)
            case "required":
                return cls(required=True, several=several)
            case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
                return cls(required=True, name=name, several=False)
        raise RequestError(
            f"tool_choice is {tool_choice!r:.80}; it must be 'none', 'auto', 'required' or "
            '{"type": "function", "function": {"name": …}}.'
        )


def call_grammar(
    lark: Lark, calling: ToolFormat, tools: Sequence[Tool], choice: Choice, text: str | None
) -> str | None:
    """What an answer is that calls `tools`: with `choice.required` calls and nothing else, otherwise text (or `text`,
    where its shape is prescribed) or calls; None where it may be anything. Where calls are not required, arguments of
    tools that are not strict are any JSON object. Raises RequestError."""
    asked = {}
    for index, (name, schema) in enumerate(schemas(tools).items()):
        if choice.required or tools[index]["function"].get("strict"):
            asked[name] = _arguments(schema, name)
        else:
            asked[name] = _ANY_OBJECT
    if choice.name is not None:
        if choice.name not in asked:
            raise RequestError(f"tool_choice names {choice.name!r}, which is none of the tools.")
        asked = {choice.name: asked[choice.name]}
    if not choice.required and text is None and all(schema is _ANY_OBJECT for schema in asked.values()):
        return None
    if calling.grammar is None:
        raise RequestError(
            "calls of tools cannot be enforced in this model's format; leave out strict, and use tool_choice auto."
        )
    written = calling.grammar(lark, asked, choice.several)
    if not choice.required and text is None and not calling.frames:
        return _among_text(lark, calling, written)
    whole = f"{lark.words(calling.head)} {written}"
    if choice.required:
        return whole
    return f"{whole} | {text or f'{lark.words(calling.response)} TEXT'}"


def _among_text(lark: Lark, calling: ToolFormat, written: str) -> str:
    """Calls wherever one of the openings is; those of an answer that is nothing else, only at its beginning."""
    if not calling.bare:
        head = calling.head
        opened = (f"{lark.until(word)} {lark.words(head.partition(word)[2])} {written}" for word in calling.openings)
        return f"({' | '.join(opened)})* TEXT"
    if not calling.first:
        raise RequestError("strict tools cannot be enforced in this model's format; use tool_choice required.")
    other = lark.rule(rf"/[^\s\{calling.first}](.|\n)*/", name="OTHER")
    tagged = (
        f"{start} {written}" for word in calling.openings for start in (lark.words(word), lark.until(word, other))
    )
    return " | ".join([written, other, *tagged])


def _arguments(schema: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    check(schema, f"the parameters of tool '{name}'")
    if schema.get("type", "object") != "object":
        raise RequestError(f"the parameters of tool '{name}' are of type {schema['type']!r}; they must be an object.")
    return {**schema, "type": "object"}
