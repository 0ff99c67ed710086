"""Text from a stream of tokens, and the search for stop strings in it. Knows bytes and text, no requests.

Both hold back what the next token may still change, and both give the same text however the stream
is cut into pieces.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from ringlm.frontend.token_bytes import TokenBytes


class Detokenizer:
    """Text as soon as its last byte is here; never half a character. Costs the same for every token.

    Invalid bytes become U+FFFD as in the WHATWG encoding standard, as Rust and Python do it.
    `continues`: the text goes on from a prompt, so a space at its start stays.
    """

    def __init__(self, token_bytes: TokenBytes, continues: bool = False) -> None:
        self._bytes = token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = token_bytes.strips_space and not continues

    def push(self, tokens: Iterable[int]) -> str:
        """The characters that `tokens` complete."""
        return self._stripped(self._utf8.decode(b"".join(self._bytes[token] for token in tokens)))

    def finish(self) -> str:
        """The end of the stream: bytes of a character that never came whole, as U+FFFD."""
        return self._stripped(self._utf8.decode(b"", final=True))

    def _stripped(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
