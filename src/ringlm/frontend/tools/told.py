"""All that is told of one answer: its text, its reasoning, its calls of tools. Knows no formats and no tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ringlm.frontend.answer import ToolCallDelta
from ringlm.frontend.tools.calls import Calls


class Parsed(NamedTuple):
    """News of an answer. Joined, they do not depend on how its text was cut."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class Told(Calls):
    """Calls, and the text and the reasoning around them."""

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str], on_tell: Callable[[], None]
    ) -> None:
        super().__init__(tools, new_id, on_tell)
        self.text = _Trimmed()
        self._reasoning = _Trimmed(from_start=True)

    def say(self, text: str) -> None:
        self.text.push(text)
        self._on_tell()

    def reason(self, text: str) -> None:
        self._reasoning.push(text)
        self._on_tell()

    def cut(self) -> None:
        """Something else comes between what was said and thought and what will be."""
        self.text.cut()
        self._reasoning.cut()

    def news(self) -> Parsed:
        """What has been told since the last time."""
        return Parsed(self.text.take(), self._reasoning.take(), self.take())


class _Trimmed:
    """A stream of text that can be cut: a line break takes the place of white space around a cut."""

    def __init__(self, from_start: bool = False) -> None:
        self._ready: list[str] = []
        self._space = ""
        self._after_cut = from_start
        self._said = False

    def push(self, text: str) -> None:
        text = self._space + text
        if self._after_cut:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._ready.append("\n" + said if self._after_cut and self._said else said)
            self._after_cut, self._said = False, True

    def cut(self) -> None:
        self._space, self._after_cut = "", True

    def finish(self) -> None:
        self._ready.append(self._space)
        self._space = ""

    def take(self) -> str:
        text = "".join(self._ready)
        self._ready.clear()
        return text
