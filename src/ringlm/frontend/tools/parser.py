"""What a model writes, told apart as it comes: its reasoning, its text, its calls of tools. Knows text, no tokens.

    reasoning, if there is any -> text, up to what opens a call -> the call, or text again if it is none -> text …

White space next to reasoning and to calls is dropped, all else is told: what looked like a call and is none is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ringlm.frontend.answer import ToolCallDelta
from ringlm.frontend.tools.calls import Calls, openai_id
from ringlm.frontend.tools.formats import Reasoning, ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps


class Parsed(NamedTuple):
    """News of an answer. Joined, they do not depend on how its text was cut."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()


class AnswerParser:
    """Reads one answer.

    `calling` is how the model calls `tools`, None when it has none; these are names with JSON schemas. `reasoning` is
    what is around its reasoning, which the prompt may have `opened`. `markers` are what the parser must be shown even
    if it is special tokens.
    """

    def __init__(
        self,
        calling: ToolFormat | None = None,
        tools: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
        reasoning: Reasoning | None = None,
        opened: bool = False,
    ) -> None:
        self.markers = frozenset((reasoning or ()) + (calling.openings + calling.inner if calling else ()))
        self._calling = calling
        self._marks = reasoning
        self._opened = opened
        self._reader = Reader()
        self._calls = Calls(tools, calling.new_id if calling else openai_id, self._reader.mark)
        self._text = _Trimmed()
        self._reasoning = _Trimmed(from_start=True)
        self._steps = self._read()

    @property
    def called(self) -> bool:
        """Whether calls came, and every one of them whole."""
        return self._calls.told == self._calls.whole > 0

    def push(self, text: str) -> Parsed:
        """More of the answer."""
        self._reader.feed(text)
        return self._news()

    def finish(self) -> Parsed:
        """The end of the answer: what was held back."""
        self._reader.end()
        return self._news()

    def _news(self) -> Parsed:
        next(self._steps, None)
        return Parsed(self._text.take(), self._reasoning.take(), self._calls.take())

    def _read(self) -> Steps[None]:
        if self._marks is not None:
            yield from self._read_reasoning(self._marks)
        if self._calling is None:
            yield from self._reader.until((), self._say)
        else:
            yield from self._read_text_and_calls(self._calling)
        self._text.finish()

    def _read_reasoning(self, marks: Reasoning) -> Steps[None]:
        if (yield from self._reader.one_of(marks.opening)) or self._opened:
            yield from self._reader.until((marks.closing,), self._reason)
            self._text.cut()

    def _read_text_and_calls(self, calling: ToolFormat) -> Steps[None]:
        if calling.bare:
            yield from self._read_calls(calling, "")
        while opening := (yield from self._reader.until(calling.openings, self._say)):
            yield from self._read_calls(calling, opening)

    def _read_calls(self, calling: ToolFormat, opening: str) -> Steps[None]:
        self._reader.mark()
        before = self._calls.told
        try:
            yield from calling.read(self._reader, self._calls)
        except Broken:
            self._reader.back_to_mark()  # which is after all that was told
        if self._calls.told > before:
            self._text.cut()
        else:
            self._say(opening)

    def _say(self, text: str) -> None:
        self._text.push(text)
        self._reader.mark()

    def _reason(self, text: str) -> None:
        self._reasoning.push(text)
        self._reader.mark()


class _Trimmed:
    """A stream of text that can be cut: white space before and after a cut is dropped."""

    def __init__(self, from_start: bool = False) -> None:
        self._ready: list[str] = []
        self._space = ""
        self._after_cut = from_start

    def push(self, text: str) -> None:
        text = self._space + text
        if self._after_cut:
            text = text.lstrip()
        said = text.rstrip()
        self._space = text[len(said) :]
        if said:
            self._after_cut = False
            self._ready.append(said)

    def cut(self) -> None:
        self._space, self._after_cut = "", True

    def finish(self) -> None:
        self._ready.append(self._space)
        self._space = ""

    def take(self) -> str:
        text = "".join(self._ready)
        self._ready.clear()
        return text
