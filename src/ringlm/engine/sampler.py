"""From logits to tokens, on rank 0. Knows distributions, not where the logits come from.

The steps and their order are vLLM's: temperature, top_k, top_p (Holtzman et al., "The Curious Case of Neural
Text Degeneration", 2020), min_p (Nguyen et al., "Turning Up the Heat", 2024). What a request draws depends
on its own logits, parameters, seed and position: not on the batch, nor on how many candidates were sent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ringlm.engine.logits import Candidates, Floats, Indices, Logits, best, select
from ringlm.engine.randomness import uniform
from ringlm.engine.request import SamplingParams
from ringlm.engine.sequence import Sequence
from ringlm.errors import RequestError

MAX_CANDIDATES = 64  # with more, picking and merging them costs about what sending every logit does

Weights = NDArray[np.float64]


def candidates(sequences: list[Sequence]) -> int:
    """How many of the best logits suffice to choose every sequence's next token; 0 if all are needed."""
    needed = 1
    for sequence in sequences:
        params = sequence.params
        if params.temperature > 0.0:
            if not 0 < params.top_k <= MAX_CANDIDATES:
                return 0
            needed = max(needed, params.top_k)
    return needed


def sample(logits: Logits | None, sequences: list[Sequence]) -> list[int | RequestError]:
    """The next token of each sequence, from its row of `logits` (None: no rows); an error where the row is
    unusable."""
    if logits is None:
        return []
    if isinstance(logits, Candidates):
        values, ids = logits
        leaders: list[int] = ids[:, 0].tolist()
        peaks: list[float] = values[:, 0].tolist()
    else:
        values, ids = logits, None
        leaders = values.argmax(axis=1).tolist()
        peaks = values[np.arange(len(values)), leaders].tolist()
    chosen: list[int | RequestError] = []
    for row, (sequence, leader, peak) in enumerate(zip(sequences, leaders, peaks, strict=True)):
        if not -np.inf < peak < np.inf:
            chosen.append(_unusable(sequence, peak))
        elif sequence.params.temperature == 0.0:
            chosen.append(leader)
        else:
            u = uniform(sequence.seed, len(sequence.tokens))
            index = draw(values[row], sequence.params, u)
            chosen.append(index if ids is None else int(ids[row, index]))
    return chosen


def draw(row: Floats, params: SamplingParams, u: float) -> int:
    """The index into `row` (V,) at which the distribution that `params` make of it passes `u` in [0, 1).

    `row` holds finite values and -inf, its best one finite.
    """
    kept: Indices | None = None  # None: all
    if params.top_k > 0:
        kept = best(row, params.top_k)
        row = row[kept]
    weights = _weigh(row, row.max(), params.temperature)
    if params.top_p < 1.0:
        nucleus = _nucleus(row, weights, params)
        weights = weights[nucleus]
        kept = nucleus if kept is None else kept[nucleus]
    if params.min_p > 0.0:
        likely = np.flatnonzero(weights >= params.min_p * weights.max())
        weights = weights[likely]
        kept = likely if kept is None else kept[likely]
    passed = np.cumsum(weights)
    target = min(u * passed[-1], np.nextafter(passed[-1], 0.0))  # rounding may take u * total up to the total
    index = int(np.searchsorted(passed, target, side="right"))
    return index if kept is None else int(kept[index])


def _weigh(values: Floats, peak: float, temperature: float) -> Weights:
    """exp((value - peak) / temperature): probabilities before division by their sum."""
    weights = values.astype(np.float64)
    weights -= peak
    with np.errstate(over="ignore"):  # a tiny temperature: -inf is right
        weights /= temperature
    return np.exp(weights, out=weights)


def _nucleus(row: Floats, weights: Weights, params: SamplingParams) -> Indices:
    """The fewest indices whose weights make up the share `top_p` of the whole; at least one."""
    goal = params.top_p * weights.sum()
    size = 256  # the nucleus is seldom larger, and sorting everything takes milliseconds
    while True:
        first = max(row.size - size, 0)
        values = np.sort(np.partition(row, first)[first:])[::-1]
        passed = np.cumsum(_weigh(values, values[0], params.temperature))
        if passed[-1] >= goal or first == 0:
            return select(row, int(np.searchsorted(passed, goal)) + 1)
        size *= 8


def _unusable(sequence: Sequence, peak: float) -> RequestError:
    return RequestError(
        f"The model's best logit for token {len(sequence.tokens)} of request {sequence.id} is {peak}: its weights "
        "are damaged, or --dtype overflows (try --dtype float32)."
    )
