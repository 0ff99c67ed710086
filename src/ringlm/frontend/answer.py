"""What comes of a request, as callers see it: pieces of a stream, and whole answers. Knows no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """A token of an answer, the natural logarithm of its probability, and the likeliest tokens in its place.

    `text` is what the token stands for; `data` its bytes, which need not be whole characters.
    """

    token: int
    text: str
    data: bytes
    logprob: float
    top: tuple[Logprob, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """A call of one of the caller's tools. `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ToolCallDelta:
    """News of the answer's tool call number `index`: `id` and `name` come first and once, `arguments` bit by bit."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Piece:
    """News of answer number `index`: text, the tokens since its last piece, so many of which were spent on reasoning,
    and at its end why it ended."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str | None = None
    index: int = 0
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class Choice:
    """One whole answer of a request; `stop` is the stop string that ended it, if one did."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    stop: str | None = None


@dataclass(frozen=True)
class Completion:
    """All answers to one prompt; `text`, `token_ids` and `finish_reason` are the first's.

    Rates are tokens per second, 0 when there was nothing to measure; `tokens_per_s` counts from the first token to the
    last. `completion_tokens` are those of all that was generated, answers that `best_of` left out included.
    `cached_tokens` of the prompt were found in the prefix cache. `ring_share` is the part of the time that rank 0 spent
    in collectives, from 0 to 1.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    choices: tuple[Choice, ...]
    prompt_tokens_per_s: float = 0.0
    tokens_per_s: float = 0.0
    ring_share: float = 0.0
    cached_tokens: int = 0
    queue_s: float = 0.0
