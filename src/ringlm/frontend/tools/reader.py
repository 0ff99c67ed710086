"""Reading an answer that is still being written: take what comes next, or wait for more. Knows characters, no formats.

The methods that read are generators, which yield where what has come does not decide yet. So a format reads like the
parser of a whole text, and what it finds does not depend on where the text was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from ringlm.frontend.stops import beginning

_T = TypeVar("_T")
Steps = Generator[None, None, _T]  # yields for more text, returns _T

_CLOSING = {"{": "}", "[": "]", "(": ")"}


class Broken(Exception):
    """What is read is not what it looked like."""


class Reader:
    """The text from the last `mark` on, and how much of it has been read."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._ended = False

    def feed(self, text: str) -> None:
        """More of the answer."""
        self._text += text

    def end(self) -> None:
        """No more will come."""
        self._ended = True

    def mark(self) -> None:
        """What has been read is done with. May be called by what is told of it."""
        self._text, self._at = self._text[self._at :], 0

    def back_to_mark(self) -> None:
        """Read again what has been read since the mark."""
        self._at = 0

    def skip(self, word: str) -> None:
        """Take `word`, which comes next."""
        self._at += len(word)

    def until(self, words: Sequence[str], tell: Callable[[str], None]) -> Steps[str]:
        """Take and tell what comes before the first of `words`, and return that, which comes next; "" if none comes.

        No word may begin within another.
        """
        while True:
            found = [(at, word) for word in words if (at := self._text.find(word, self._at)) >= 0]
            held = 0 if self._ended else beginning(self._text[self._at :], words)
            end, word = min(found, default=(len(self._text) - held, ""))
            if text := self._take(end):
                tell(text)
            if word or self._ended:
                return word
            yield

    def through(self, word: str, tell: Callable[[str], None]) -> Steps[None]:
        """Take and tell what comes before `word`, and take that; Broken if it does not come."""
        if not (yield from self.until((word,), tell)):
            raise Broken
        self.skip(word)

    def one_of(self, *words: str) -> Steps[str]:
        """Take the longest of `words` that comes next, after any white space; "" and nothing taken if none does."""
        start = self._at
        yield from self.over()
        longest = max(map(len, words), default=0)
        while True:
            rest = self._text[self._at : self._at + longest]
            if self._ended or not any(len(word) > len(rest) and word.startswith(rest) for word in words):
                break
            yield
        word = max(filter(rest.startswith, words), key=len, default="")
        self._at = self._at + len(word) if word else start
        return word

    def expect(self, *words: str) -> Steps[str]:
        """`one_of` them, or Broken."""
        word = yield from self.one_of(*words)
        if not word:
            raise Broken
        return word

    def in_turn(self, words: Iterable[str]) -> Steps[None]:
        """`expect` them, one after the other."""
        for word in words:
            yield from self.expect(word)

    def comes(self, *words: str) -> Steps[bool]:
        """Whether one of `words` comes next, after any white space; nothing is taken."""
        start = self._at
        word = yield from self.one_of(*words)
        self._at = start
        return bool(word)

    def over(self) -> Steps[bool]:
        """Take white space; whether the answer is over then."""
        while (yield from self._more()) and self._text[self._at].isspace():
            self._at += 1
        return self._at == len(self._text)

    def string(self) -> Steps[str]:
        """Take a JSON string after any white space; what it stands for."""
        yield from self.expect('"')
        start, escaped = self._at - 1, False
        while (yield from self._more()):
            character = self._take(self._at + 1)
            if character == '"' and not escaped:
                return str(decoded(self._text[start : self._at]))
            escaped = character == "\\" and not escaped
        raise Broken

    def object(self, tell: Callable[[str], None]) -> Steps[None]:
        """Take a JSON object after any white space, and tell its text as it comes, from its first key on.

        Broken where its brackets do not match, or at its end when it is no JSON.
        """
        yield from self.expect("{")
        start = self._at - 1
        if not (yield from self.comes('"', "}")):
            raise Broken
        self._at = start
        told = []

        def also(text: str) -> None:
            told.append(text)
            tell(text)

        yield from self.enclosed('"', also)
        decoded("".join(told))

    def enclosed(self, quotes: str, tell: Callable[[str], None]) -> Steps[None]:
        """Take what is from the bracket that comes next to the one that closes it, and tell it as it comes. Brackets
        in strings, which begin and end with one of `quotes`, do not count. Broken where brackets do not match."""
        brackets = _Brackets(quotes)
        while not brackets.closed and (yield from self._more()):
            end = self._at
            while end < len(self._text) and not brackets.closed and brackets.fit(self._text[end]):
                end += 1
            if text := self._take(end):
                tell(text)
            else:
                break
        if not brackets.closed:
            raise Broken

    def _more(self) -> Steps[bool]:
        """Whether another character comes."""
        while self._at == len(self._text):
            if self._ended:
                return False
            yield
        return True

    def _take(self, end: int) -> str:
        start, self._at = self._at, end
        return self._text[start:end]


class _Brackets:
    """Which brackets are open at some place of a text that begins with one."""

    def __init__(self, quotes: str) -> None:
        self.closed = False
        self._quotes = quotes
        self._closing: list[str] = []
        self._quote = ""
        self._escaped = False

    def fit(self, character: str) -> bool:
        """Go on by a character, unless it closes another bracket than the one that is open."""
        if self._quote:
            if character == self._quote and not self._escaped:
                self._quote = ""
            self._escaped = character == "\\" and not self._escaped
        elif character in self._quotes:
            self._quote = character
        elif character in _CLOSING:
            self._closing.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if self._closing[-1] != character:
                return False
            self._closing.pop()
            self.closed = not self._closing
        return True


def decoded(text: str) -> Any:
    """What a JSON text stands for. Broken when it is none."""
    try:
        return msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        raise Broken from None
