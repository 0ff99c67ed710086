"""One request on its way: its tokens so far, what of them is cached, when it ends. Rank 0 only; knows token
ids, no scheduling, no tensors."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from ringlm.engine.news import Output
from ringlm.engine.request import SamplingParams, StopReason, TokenLogprob
from ringlm.engine.shaping import Shaping
from ringlm.errors import RequestError

if TYPE_CHECKING:
    from ringlm.engine.grammar import Grammar


class Limits(NamedTuple):
    """What the model allows every request."""

    context: int  # positions of the cache a sequence may fill
    vocabulary: int
    eos_token_ids: frozenset[int]


class Moment(NamedTuple):
    """A reading of the clock: seconds since some start, in all, within collectives and within forward passes."""

    wall_s: float
    ring_s: float
    forward_s: float = 0.0


Clock = Callable[[], Moment]


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's tokens and how far they are computed.

    Position i holds tokens[i]; the keys and values of the first `cached` positions lie in `blocks`.
    `blocks` is replaced, never changed: step messages hold it. Of those the first `known` are in the prefix cache; they
    hold the prefix that it knows by the number `prefix`.
    """

    id: int
    tokens: list[int]  # the prompt, then what was generated
    params: SamplingParams
    seed: int
    stop_ids: frozenset[int]
    max_length: int  # of tokens
    shaping: Shaping | None = None  # None: its logits stay as they are
    grammar: Grammar | None = None  # None: it may write anything
    embeds: bool = False  # its vector is asked for, and no token
    cached: int = 0
    blocks: list[int] = field(default_factory=list)
    known: int = 0
    prefix: int = 0
    found: int = 0  # tokens of the prompt that were cached when it was first admitted
    submitted: Moment | None = None
    admitted: Moment | None = None  # for the first time
    first_token: Moment | None = None

    @property
    def pending(self) -> int:
        """Tokens that are not cached: 1 while decoding."""
        return len(self.tokens) - self.cached

    @property
    def queue_s(self) -> float:
        """How long it waited to be admitted; 0 if it has not been."""
        return self.admitted.wall_s - self.submitted.wall_s if self.admitted and self.submitted else 0.0

    @property
    def plain(self) -> bool:
        """Whether its next token is the one of the best logit, and nothing else is asked."""
        free = self.shaping is None and self.grammar is None
        return free and self.params.temperature == 0.0 and self.params.logprobs is None

    def append(self, token: int) -> StopReason | None:
        """Take the next token; why the sequence ends with it, if it does."""
        self.tokens.append(token)
        if self.shaping is not None:
            self.shaping.add(token)
        if self.grammar is not None:
            self.grammar.add(token)
        if token in self.stop_ids or (self.grammar is not None and self.grammar.ended):
            return StopReason.STOP
        return StopReason.LENGTH if len(self.tokens) >= self.max_length else None

    def ended(
        self,
        now: Moment,
        tokens: list[int],
        reason: StopReason | None = None,
        error: str | None = None,
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> Output:
        """The last news, with the timings of the whole; those of a phase never reached are 0."""
        start = self.admitted or now
        first = self.first_token or now
        return Output(
            id=self.id,
            tokens=tokens,
            finish_reason=reason,
            prefill_s=first.wall_s - start.wall_s,
            decode_s=now.wall_s - first.wall_s,
            ring_s=now.ring_s - start.ring_s,
            error=error,
            logprobs=logprobs,
            queue_s=self.queue_s,
            cached_tokens=self.found,
        )


def begin(
    id: int,
    prompt_tokens: list[int],
    params: SamplingParams,
    limits: Limits,
    *,
    grammar: Grammar | None = None,
    embeds: bool = False,
) -> Sequence:
    """The sequence of a new request, which follows `grammar`; RequestError for a prompt that cannot be computed, or
    parameters that do not suit the model.

    The last token generated is never fed back, so a prompt that fills the context still gets one.
    """
    _check_prompt(prompt_tokens, limits)
    stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else limits.eos_token_ids)
    return Sequence(
        id=id,
        tokens=list(prompt_tokens),
        params=params,
        seed=secrets.randbits(64) if params.seed is None else params.seed,
        stop_ids=stop_ids,
        max_length=min(len(prompt_tokens) + params.max_tokens, limits.context + 1),
        shaping=Shaping.of(params, prompt_tokens, stop_ids, limits.vocabulary),
        grammar=grammar,
        embeds=embeds,
    )


def _check_prompt(tokens: list[int], limits: Limits) -> None:
    if not tokens:
        raise RequestError("The prompt is empty; it needs at least one token.")
    if len(tokens) > limits.context:
        raise RequestError(
            f"The prompt has {len(tokens)} tokens and the context holds {limits.context}; "
            "shorten the prompt or raise --context."
        )
    if min(tokens) < 0 or max(tokens) >= limits.vocabulary:
        index, token = next((i, t) for i, t in enumerate(tokens) if not 0 <= t < limits.vocabulary)
        raise RequestError(
            f"Prompt token {index} is {token}; token ids of this model are 0 to {limits.vocabulary - 1}."
        )
