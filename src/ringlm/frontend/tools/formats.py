"""How models write calls of tools, and the place of their reasoning: told by what their chat templates say.

A format is a module of this package with a `FORMAT` and a line here; it is imported when a model asks for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from ringlm.frontend.tools.calls import Calls, openai_id
from ringlm.frontend.tools.reader import Reader, Steps


class ToolFormat(NamedTuple):
    """One way of writing calls.

    `read` reads one or more calls that follow one of `openings`, or with `bare` also those that an answer begins with,
    and raises Broken where they end in something else. `inner` are other words of the format that may be special
    tokens.
    """

    read: Callable[[Reader, Calls], Steps[None]]
    openings: tuple[str, ...]
    inner: tuple[str, ...] = ()
    bare: bool = False
    new_id: Callable[[], str] = openai_id


class Reasoning(NamedTuple):
    """What stands around a model's reasoning, at the beginning of an answer."""

    opening: str
    closing: str


_FORMATS: Final[Mapping[str, str]] = {  # by module, what a template has; the first counts
    "mistral": r"\[TOOL_CALLS\]",
    "pythonic": r"\[func_name1\(",
    "qwen_coder": r"<function=.*<parameter=",
    "hermes": r"\A(?!.*(<function=|<arg_key>)).*<tool_call>",
    "llama": r"<\|python_tag\|>|\"name\": .{1,80}\"parameters\": ",
}
_REASONING: Final = (Reasoning("<think>", "</think>"), Reasoning("[THINK]", "[/THINK]"))


def tool_format(template: str) -> ToolFormat | None:
    """The format in which a model with this chat template calls tools; None for one that is not known here."""
    for module, sign in _FORMATS.items():
        if re.search(sign, template, re.DOTALL):
            found: ToolFormat = importlib.import_module(f"ringlm.frontend.tools.{module}").FORMAT
            return found
    return None


def reasoning(template: str) -> Reasoning | None:
    """What is around the reasoning of a model with this chat template; None for one that has none."""
    return next((marks for marks in _REASONING if marks.closing in template), None)
