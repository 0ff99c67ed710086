"""What the engine has to tell of requests and of itself. Knows token ids."""

from __future__ import annotations

import msgspec

from ringlm.engine.request import StopReason, TokenLogprob


class Output(msgspec.Struct, frozen=True, tag=True):
    """News of request `id`: new tokens, and at its end why it ended, with the timings of the whole."""

    id: int
    tokens: list[int]
    finish_reason: StopReason | None = None
    prefill_s: float = 0.0  # from the (first) admission to the first token
    decode_s: float = 0.0  # from the first token to the last
    ring_s: float = 0.0  # time within collectives, of prefill_s + decode_s
    error: str | None = None  # the request was refused (a RequestError); finish_reason is then None
    logprobs: tuple[TokenLogprob, ...] = ()  # of `tokens`, where they were asked for
    queue_s: float = 0.0  # from submission to the (first) admission
    cached_tokens: int = 0  # of the prompt, found in the prefix cache
    busy: bool = False  # of an error: too many requests wait (a QueueFullError)


class Figures(msgspec.Struct, frozen=True):
    """How the engine does; counters count from its start."""

    running: int
    waiting: int
    blocks: int  # of the cache
    blocks_in_use: int  # by requests
    blocks_cached: int  # free, and holding a prefix that may be asked for again
    steps: int
    prompt_tokens: int
    cached_tokens: int  # of the prompts, found in the prefix cache
    generated_tokens: int
    preemptions: int
    step_s: float  # within steps, the ring's time included
    ring_s: float  # of it, within collectives
    forward_s: float  # of it, within forward passes, their collectives included
