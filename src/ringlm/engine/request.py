"""A request and how it ends: sampling parameters and stop reasons. Knows token ids, no text, no torch."""

from __future__ import annotations

import enum
from typing import Any

import msgspec

from ringlm.errors import RequestError


class StopReason(str, enum.Enum):
    """Why a generation ended. Prints as the OpenAI API spells it."""

    STOP = "stop"  # an end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    TOOL_CALLS = "tool_calls"  # the answer is a call of the caller's tools
    CANCELED = "canceled"  # the caller ended it

    def __str__(self) -> str:
        return self.value


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens and when to stop; the names are vLLM's.

    temperature 0 is greedy. top_k 0 or -1 keeps every token; top_p 1 and min_p 0 likewise. `seed`
    None draws a fresh one. `stop` are strings (kept out of the text), `stop_token_ids` are ids.
    """

    max_tokens: int = 512
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}; it must be {rule}.")

        check(self.max_tokens >= 1, "max_tokens", "1 or more")
        check(0.0 <= self.temperature <= 100.0, "temperature", "between 0 and 100")
        check(self.top_k >= -1, "top_k", "-1 or 0 (every token) or more")
        check(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        check(0.0 <= self.min_p <= 1.0, "min_p", "between 0 and 1")
        check(all(self.stop), "stop", "strings that are not empty")

    def replace(self, **changes: Any) -> SamplingParams:
        """A copy with some fields changed."""
        return msgspec.structs.replace(self, **changes)
