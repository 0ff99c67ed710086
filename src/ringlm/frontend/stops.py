"""Stop strings in a stream of text: held back, found, cut off. Knows text only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class StopStrings:
    """Lets text through up to the stop string that is complete first, whose characters it keeps.

    Of stops that end at the same character the longest counts. `found` is that stop, or None.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """The text that no stop string can claim any more; "" once one is found."""
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        # Ends first, so that the answer does not depend on where the stream was cut.
        ends = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if ends:
            _, at, self.found = min(ends)
            self._held = ""
            return text[:at]
        keep = beginning(text, self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The end of the stream: what was held back and is no stop string."""
        held, self._held = self._held, ""
        return held


def beginning(text: str, words: Sequence[str]) -> int:
    """How many of the last characters of `text` may be the beginning of one of `words`."""
    for size in range(min(len(text), max(map(len, words), default=1) - 1), 0, -1):
        if any(word.startswith(text[-size:]) for word in words):
            return size
    return 0
