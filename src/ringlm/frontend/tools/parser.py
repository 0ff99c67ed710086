"""What a model writes, told apart as it comes: its thoughts, its text, its calls of tools. Knows text, no tokens.

    thoughts first, if it thinks -> text, up to what opens a call -> the call, or text again if it is none -> text …

White space next to thoughts and to calls is dropped, all else is told: what looked like a call and is none is text.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

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

    `calling` is how the model calls the tools `names`, None when it has none; `thinking` what is around its thoughts,
    and `thinks` says that the prompt has opened them. `markers` are what it must be shown even if special tokens.
    """

    def __init__(
        self,
        calling: ToolFormat | None = None,
        names: Collection[str] = (),
        thinking: Reasoning | None = None,
        thinks: bool = False,
    ) -> None:
        self.markers = frozenset((thinking or ()) + (calling.openings + calling.inner if calling else ()))
        self._calling = calling
        self._thinking = thinking
        self._thinks = thinks
        self._reader = Reader()
        self._calls = Calls(names, calling.new_id if calling else openai_id, self._reader.mark)
        self._text = _Trimmed()
        self._thoughts = _Trimmed(from_start=True)
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
        return Parsed(self._text.take(), self._thoughts.take(), self._calls.take())

    def _read(self) -> Steps[None]:
        if self._thinking is not None:
            yield from self._read_thoughts(self._thinking)
        if self._calling is not None and self._calling.bare:
            yield from self._read_calls(self._calling, "")
        openings = () if self._calling is None else self._calling.openings
        while opening := (yield from self._reader.until(openings, self._say)):
            assert self._calling is not None
            yield from self._read_calls(self._calling, opening)
        self._text.finish()

    def _read_thoughts(self, marks: Reasoning) -> Steps[None]:
        if (yield from self._reader.one_of(marks.opening)) or self._thinks:
            yield from self._reader.until((marks.closing,), self._think)
            self._text.cut()

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

    def _think(self, text: str) -> None:
        self._thoughts.push(text)
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
