"""From logits to tokens, on rank 0: how many of the logits a step needs, what each request does to its row, which token
it draws. Knows not where the logits come from.

What a request draws depends on its own logits, parameters, tokens and seed: not on the batch, nor on how many
candidates were sent. Probabilities that are told are those of the model's own logits, before anything is done to them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ringlm.engine.distribution import draw
from ringlm.engine.logits import Candidates, Floats, Logits, best, log_probabilities
from ringlm.engine.randomness import uniform
from ringlm.engine.request import TokenLogprob
from ringlm.engine.sequence import Sequence
from ringlm.errors import RequestError

MAX_CANDIDATES = 64  # with more, picking and merging them costs about what sending every logit does


class Needed(NamedTuple):
    """What a step needs of the logits to choose every sequence's next token; as StepMessage has it."""

    candidates: int
    log_sums: bool


class Chosen(NamedTuple):
    """A sequence's next token, and its probability where that was asked for."""

    token: int
    logprob: TokenLogprob | None = None


def needed(sequences: list[Sequence]) -> Needed:
    """How many of the best logits suffice; 0 candidates if all are needed."""
    most, log_sums = 1, False
    for sequence in sequences:
        if sequence.plain:
            continue
        params, shaping = sequence.params, sequence.shaping
        count = 1 if params.temperature == 0.0 else params.top_k
        if count <= 0 or sequence.grammar is not None or (shaping is not None and not shaping.only_masks):
            return Needed(0, False)
        if shaping is not None:
            count += len(shaping.masked(sequence.tokens))
        if params.logprobs is not None:
            log_sums, count = True, max(count, params.logprobs)
        most = max(most, count)
    return Needed(most, log_sums) if most <= MAX_CANDIDATES else Needed(0, False)


def sample(logits: Logits | None, sequences: list[Sequence]) -> list[Chosen | RequestError]:
    """The next token of each sequence, from its row of `logits` (None: no rows); an error where the row is
    unusable."""
    if logits is None:
        return []
    if isinstance(logits, Candidates):
        values, ids, log_sums = logits
        leaders: list[int] = ids[:, 0].tolist()
        peaks: list[float] = values[:, 0].tolist()
    else:
        values, ids, log_sums = logits, None, None
        leaders = values.argmax(axis=1).tolist()
        peaks = values[np.arange(len(values)), leaders].tolist()
    chosen: list[Chosen | RequestError] = []
    for row, (sequence, leader, peak) in enumerate(zip(sequences, leaders, peaks, strict=True)):
        if not -np.inf < peak < np.inf:
            chosen.append(_unusable(sequence, peak))
        elif sequence.plain:
            chosen.append(Chosen(leader))
        else:
            log_sum = None if log_sums is None else float(log_sums[row])
            index = 0 if ids is not None else leader
            chosen.append(_choose(sequence, values[row], None if ids is None else ids[row], index, log_sum))
    return chosen


def _choose(
    sequence: Sequence, row: Floats, ids: NDArray[np.int32] | None, index: int, log_sum: float | None
) -> Chosen | RequestError:
    """The token, from the logits `row` (k,) of the tokens `ids`, or (V,) of all; `index` is that of the best one."""
    params, shaping, grammar, shaped = sequence.params, sequence.shaping, sequence.grammar, row
    if grammar is not None:
        if grammar.error is not None:
            return RequestError(f"The shape of request {sequence.id} cannot be followed further: {grammar.error}.")
        shaped = grammar.masked(row)
    if shaping is not None and not (grammar is not None and grammar.complete):  # which ends, whatever else is asked
        shaped = shaping.apply(shaped, sequence.tokens, ids)
    if shaped is not row:
        index = int(shaped.argmax())
        if not -np.inf < shaped[index] < np.inf:
            return _excluded(sequence) if shaped[index] == -np.inf else _unusable(sequence, float(shaped[index]))
    if params.temperature > 0.0:
        index = draw(shaped, params, uniform(sequence.seed, len(sequence.tokens)))
    token = index if ids is None else int(ids[index])
    if params.logprobs is None:
        return Chosen(token)
    logs = log_probabilities(row) if log_sum is None else row - log_sum
    top = best(row, params.logprobs) if params.logprobs else np.empty(0, np.intp)
    likeliest = zip((top if ids is None else ids[top]).tolist(), logs[top].tolist(), strict=True)
    return Chosen(token, TokenLogprob(token, float(logs[index]), [pair for pair in likeliest if pair[1] > -np.inf]))


def _excluded(sequence: Sequence) -> RequestError:
    names = [] if sequence.shaping is None else sequence.shaping.masking(sequence.tokens)
    if sequence.grammar is not None:
        names.append("structured_outputs")
    return RequestError(
        f"Nothing is left to choose for token {len(sequence.tokens)} of request {sequence.id}: every token that the "
        f"model could write is excluded by {' and '.join(names)}."
    )


def _unusable(sequence: Sequence, peak: float) -> RequestError:
    return RequestError(
        f"The model's best logit for token {len(sequence.tokens)} of request {sequence.id} is {peak}: its weights "
        "are damaged, or --dtype overflows (try --dtype float32)."
    )
