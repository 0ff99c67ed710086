"""How models write calls of tools, and the place of their reasoning: told by what their chat templates say.

A format is a layout (`layouts.py`), or a module of this package with a `FORMAT`, and a line here; it is imported when a
model asks for it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from ringlm.errors import ConfigError
from ringlm.frontend.grammar import Lark
from ringlm.frontend.tools.calls import openai_id
from ringlm.frontend.tools.reader import Reader, Steps
from ringlm.frontend.tools.told import Told

Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]  # of the arguments, by tool


class Reasoning(NamedTuple):
    """What stands around a model's reasoning, at the beginning of an answer, and around its response after that."""

    opening: str
    closing: str
    response: str = ""
    response_closing: str = ""


class ToolFormat(NamedTuple):
    """One way of writing calls.

    `read` reads one or more calls from one of `openings` on, or with `bare` also from the beginning of an answer, and
    raises Broken where they end in something else. In `inner` are other words of the format, which may be special
    tokens. `frames` are around text and reasoning too, so that all answers of the model are read by it. `write` makes
    calls, which are names with arguments, as a model would. `reasoning` is for formats that say it themselves.

    Calls are enforced by what follows `head`, which has the openings that are one after the other: `grammar` says it
    of tools, and whether of several calls; None where that is not known. A `bare` answer with calls begins with
    one of `first`. In formats with frames `thoughts` and `response` are written so.
    """

    read: Callable[[Reader, Told], Steps[None]]
    openings: tuple[str, ...]
    inner: tuple[str, ...] = ()
    bare: bool = False
    frames: bool = False
    write: Callable[[Sequence[tuple[str, Mapping[str, Any]]]], str] | None = None
    reasoning: Reasoning | None = None
    new_id: Callable[[], str] = openai_id
    head: str = ""
    grammar: Callable[[Lark, Schemas, bool], str] | None = None
    first: str = ""
    thoughts: Reasoning | None = None
    response: str = ""


_FORMATS: Final[Mapping[str, str]] = {  # by module, what a template has; the first counts
    "harmony": r"<\|channel\|>analysis",
    "mistral": r"\[TOOL_CALLS\]",
    "deepseek_v3": r"<｜tool▁sep｜>.*```json",
    "deepseek_v31": r"<｜tool▁sep｜>",
    "deepseek_v32": r"｜DSML｜",
    "gemma": r"<\|tool_call>call:",
    "function_gemma": r"<start_function_call>call:",
    "lfm2": r"<\|tool_(list|call)_start\|>",
    "command_r7b": r"<\|START_ACTION\|>",
    "kimi_k2": r"<\|tool_call_argument_begin\|>",
    "nemotron_nano": r"<TOOLCALL>",
    "tool_code": r"```tool_code",
    "pythonic": r"\[func_name1\(",
    "functools_list": r"functools\[",
    "phi": r"<\|/tool_call\|>|<\|/tool\|>",
    "granite": r"<\|tool_call\|>",
    "glm": r"<arg_key>",
    "seed_oss": r"<seed:tool_call>",
    "minimax": r"<minimax:tool_call>",
    "olmo3": r"<function_calls>",
    "tool_calls": r"<tool_calls>",
    "qwen_coder": r"<function=.*<parameter=",
    "functionary": r"<function=",
    "hermes": r"<tool_call>",
    "llama": r"<\|python_tag\|>|\"name\": .{1,80}\"parameters\": ",
    "xlam": r"\[\{\\?\"name\\?\": ",
}
NAMES: Final = tuple(sorted(_FORMATS))
_REASONING: Final[Mapping[str, Reasoning]] = {  # likewise
    r"<\|channel>": Reasoning("<|channel>thought", "<channel|>"),
    r"</seed:think>": Reasoning("<seed:think>", "</seed:think>"),
    r"<\|END_THINKING\|>": Reasoning("<|START_THINKING|>", "<|END_THINKING|>"),
    r"</think>.*<response>": Reasoning("<think>", "</think>", "<response>", "</response>"),
    r"</think>": Reasoning("<think>", "</think>"),
    r"\[/THINK\]": Reasoning("[THINK]", "[/THINK]"),
    r"Here is my thought process:": Reasoning("Here is my thought process:", "Here is my response:"),
}


@lru_cache
def tool_format(template: str) -> ToolFormat | None:
    """The format in which a model with this chat template calls tools; None for one that is not known here."""
    name = next((name for name, sign in _FORMATS.items() if re.search(sign, template, re.DOTALL)), None)
    return None if name is None else _named(name)


@lru_cache
def reasoning(template: str) -> Reasoning | None:
    """What is around the reasoning of a model with this chat template; None for one that has none."""
    return next((marks for sign, marks in _REASONING.items() if re.search(sign, template, re.DOTALL)), None)


def chosen_format(choice: str) -> ToolFormat:
    """The format of that name, or that a file declares (`--tool-format`). Raises ConfigError."""
    if choice in NAMES:
        return _named(choice)
    if not choice.endswith(".toml"):
        raise ConfigError(
            f"--tool-format {choice}: there is no such format; give {', '.join(NAMES)}, or a FILE.toml that "
            "declares one, as docs/tools.md shows."
        )
    from ringlm.frontend.tools.layout import read_layout

    return read_layout(Path(choice))


@lru_cache
def _named(name: str) -> ToolFormat:
    from ringlm.frontend.tools.layout import declared
    from ringlm.frontend.tools.layouts import LAYOUTS

    if name in LAYOUTS:
        return declared(LAYOUTS[name])
    found: ToolFormat = importlib.import_module(f"ringlm.frontend.tools.{name}").FORMAT
    return found
