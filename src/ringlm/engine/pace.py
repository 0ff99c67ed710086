"""How many tokens of prompts a step may take beside sequences that decode, which wait for it. Knows seconds and counts,
no sequences."""

from __future__ import annotations

import statistics
from collections import deque
from typing import Final

_STRETCH: Final = 3.0  # a step with prompts takes about so many times what it takes without
_STEPS: Final = 9  # of which the median counts
_LEAST: Final = 32  # tokens, in multiples of which they come; fewer hardly take less time
_RUN: Final = 16  # after so many steps with prompts one without tells what decoding takes by now


class Pace:
    """Learns from past steps what decoding takes, and what a token of a prompt adds."""

    def __init__(self) -> None:
        self._decode_s = deque[float](maxlen=_STEPS)
        self._token_s = deque[float](maxlen=_STEPS)
        self._run = 0

    def observe(self, seconds: float, prompt_tokens: int) -> None:
        """A step in which sequences decoded has taken so long, with so many tokens of prompts."""
        if prompt_tokens == 0:
            self._run = 0
            self._decode_s.append(seconds)
            return
        self._run += 1
        if self._decode_s:
            self._token_s.append((seconds - statistics.median(self._decode_s)) / prompt_tokens)

    def prompt_tokens(self) -> int:
        """How many the next step may take while others decode."""
        if self._run >= _RUN:
            return 0
        token_s = statistics.median(self._token_s) if self._token_s else 0.0
        if token_s <= 0.0:
            return _LEAST
        fit = (_STRETCH - 1.0) * statistics.median(self._decode_s) / token_s
        return max(_LEAST, int(fit) // _LEAST * _LEAST)
