"""What a model writes, told apart as it comes: its reasoning, its text, its calls of tools. Knows text, no tokens.

    reasoning, if there is any -> text, up to what opens a call -> the call, or text again if it is none -> text …

White space next to reasoning and to calls is dropped, all else is told: what looked like a call and is none is text.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ringlm.frontend.tools.calls import openai_id
from ringlm.frontend.tools.formats import Reasoning, ToolFormat
from ringlm.frontend.tools.reader import Broken, Reader, Steps
from ringlm.frontend.tools.told import Parsed, Told


class AnswerParser:
    """Reads one answer.

    `calling` is how the model calls `tools`, None when it has none; these are names with JSON schemas. `reasoning` is
    what is around its reasoning, which the prompt may have `opened`. In `markers` is what the parser must be shown even
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
        self._openings = calling.openings if calling else ()
        self._marks = reasoning
        self._opened = opened
        self._reader = Reader()
        self._told = Told(tools, calling.new_id if calling else openai_id, self._reader.mark)
        self._steps = self._read()

    @property
    def called(self) -> bool:
        """Whether calls came, and every one of them whole."""
        return self._told.told == self._told.whole > 0

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
        return self._told.news()

    def _read(self) -> Steps[None]:
        words = self._openings
        if self._marks is not None and (yield from self._read_reasoning(self._marks)):
            words = (*words, self._marks.response_closing)
        if self._calling is not None and self._calling.bare:
            yield from self._read_calls(self._calling, "")
        while word := (yield from self._reader.until(words, self._told.say)):
            if self._calling is not None and word in self._openings:
                yield from self._read_calls(self._calling, word)
            else:
                yield from self._end_response(word)
        self._told.text.finish()

    def _read_reasoning(self, marks: Reasoning) -> Steps[str]:
        """Reasoning, if there is any, and what opens the response after it, which is returned."""
        if not ((yield from self._reader.one_of(marks.opening)) or self._opened):
            return ""
        self._reader.skip((yield from self._reader.until((marks.closing,), self._told.reason)))
        self._told.cut()
        return (yield from self._reader.one_of(marks.response)) if marks.response else ""

    def _end_response(self, word: str) -> Steps[None]:
        """It is the end where nothing follows, and text where something does."""
        self._reader.mark()
        self._reader.skip(word)
        if (yield from self._reader.over()):
            self._told.cut()
        else:
            self._reader.back_to_mark()
            self._reader.skip(word)
            self._told.say(word)

    def _read_calls(self, calling: ToolFormat, opening: str) -> Steps[None]:
        self._reader.mark()
        before = self._told.told
        try:
            yield from calling.read(self._reader, self._told)
        except Broken:
            self._reader.back_to_mark()  # which is after all that was told
            if self._told.told == before:
                self._reader.skip(opening)
                self._told.say(opening)
                return
        self._told.cut()
