"""The shard plan: which heads, columns, vocabulary rows and layers each rank holds, for any world size.

Knows sizes only: no tensors, no files, no links. Rank 0 makes the plan and sends it to the others.

A rank's heads form a rectangle, its key-value heads by equally many query heads of each, so that
attention can fold a group's query heads into rows. With as many key-value heads as ranks or more, groups
stay whole; with fewer, several ranks share a group, split its query heads, and each repeat its
key-value head.

Attention and the MLP are balanced each for itself, since ranks wait for one another after either.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from ringlm.errors import ConfigError

UNIT: Final = 32  # columns and vocabulary rows: a quantization block, and a multiple of a vector register
_TOLERANCE: Final = 0.03  # of the largest share that keeping to whole units may add


class Range(msgspec.Struct, frozen=True, array_like=True):
    """The half-open range [start, stop)."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def __mul__(self, size: int) -> Range:
        """The elements of these units, each of `size`."""
        return Range(self.start * size, self.stop * size)

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


class RankShard(msgspec.Struct, frozen=True):
    """What one rank holds. Any range may be empty; the rank then still takes part in every collective."""

    query_heads: Range
    kv_heads: Range
    columns: Range  # of the MLP's hidden layer
    vocabulary: Range  # rows of the embedding and of the output head
    layers: Range
    expert_columns: Range = Range(0, 0)  # of the hidden layer of every expert


class ShardPlan(msgspec.Struct, frozen=True):
    """What every rank holds, by rank."""

    ranks: tuple[RankShard, ...]

    @property
    def world_size(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True)
class Dimensions:
    """The sizes that a plan divides, and the context that the model was made for (positions)."""

    hidden_size: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    columns: int
    vocabulary: int
    context: int
    name: str = ""  # for messages
    expert_columns: int = 0


def plan_shards(dimensions: Dimensions, world_size: int, weights: Sequence[float] | None = None) -> ShardPlan:
    """The plan for `world_size` ranks, in proportion to `weights` (None: equal; 0: the rank holds nothing).

    Raises ConfigError where the world size exceeds the query heads, or the weights are not one a rank.
    """
    if world_size < 1:
        raise ConfigError(f"world size {world_size} must be 1 or more.")
    if world_size > dimensions.query_heads:
        model = f"model {dimensions.name!r}" if dimensions.name else "the model"
        raise ConfigError(
            f"world size {world_size} needs at least {world_size} query heads; {model} has "
            f"{dimensions.query_heads}. Use --world-size {dimensions.query_heads} or fewer."
        )
    if dimensions.query_heads % dimensions.kv_heads:
        raise ValueError(f"{dimensions.query_heads} query heads over {dimensions.kv_heads} key-value heads")
    shares = [1.0] * world_size if weights is None else [float(weight) for weight in weights]
    text = ",".join(f"{weight:g}" for weight in shares)
    if len(shares) != world_size:
        raise ConfigError(f"--split {text} has {len(shares)} weights; world size {world_size} needs one a rank.")
    if not all(0 <= weight < math.inf for weight in shares) or not any(shares):
        raise ConfigError(f"--split {text}: weights must be 0 or more, and one of them above 0.")
    heads = _split_heads(dimensions.query_heads, dimensions.kv_heads, shares)
    sizes = dimensions.columns, dimensions.vocabulary, dimensions.expert_columns
    split = [_ranges(_split_units(size, shares)) for size in sizes]
    layers = Range(0, dimensions.layers)
    return ShardPlan(
        tuple(
            RankShard(query, kv, columns, vocabulary, layers, experts)
            for (query, kv), columns, vocabulary, experts in zip(heads, *split, strict=True)
        )
    )


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in whole parts in proportion to `weights`, which sum to more than 0: each part its quota
    rounded down, the rest to the largest remainders, ties to the lower index."""
    whole = math.fsum(weights)
    quotas = [total * (weight / whole) for weight in weights]
    parts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda index: (parts[index] - quotas[index], index))
    for index in [index for index in by_remainder if weights[index]][: total - sum(parts)]:
        parts[index] += 1
    return parts


def _split_units(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in multiples of UNIT where no rank then starves or holds much more than its part; else in ones."""
    exact = largest_remainder(total, weights)
    parts = [units * UNIT for units in largest_remainder(-(-total // UNIT), weights)]
    last = max((index for index, part in enumerate(parts) if part), default=0)
    parts[last] -= sum(parts) - total  # the last unit may be a short one
    for part, ideal in zip(parts, exact, strict=True):
        if part > ideal * (1 + _TOLERANCE) or (ideal and part <= 0):
            return exact
    return parts


def _ranges(parts: Sequence[int]) -> list[Range]:
    """Consecutive ranges of these lengths from 0 on."""
    stops = [sum(parts[: index + 1]) for index in range(len(parts))]
    return [Range(stop - part, stop) for stop, part in zip(stops, parts, strict=True)]


def _split_heads(query_heads: int, kv_heads: int, weights: Sequence[float]) -> list[tuple[Range, Range]]:
    """Each rank's query heads and key-value heads."""
    group = query_heads // kv_heads
    active = [rank for rank, weight in enumerate(weights) if weight]
    if len(active) <= kv_heads:
        whole = _ranges(largest_remainder(kv_heads, weights))
        return [(kv * group, kv) for kv in whole]
    heads = [(Range(0, 0), Range(0, 0))] * len(weights)
    first = 0
    for kv, count in enumerate(_ranks_of_groups(kv_heads, group, [weights[rank] for rank in active])):
        ranks = active[first : first + count]
        for rank, part in zip(ranks, _ranges(largest_remainder(group, [weights[rank] for rank in ranks])), strict=True):
            base = kv * group
            heads[rank] = (
                Range(base + part.start, base + part.stop),
                Range(kv, kv + 1) if len(part) else Range(kv, kv),
            )
        first += count
    return heads


def _ranks_of_groups(groups: int, group: int, weights: Sequence[float]) -> list[int]:
    """How many consecutive ranks share each group: at least one, and such that the rank that is slowest for its
    weight is as quick as can be (ties: the smallest sum of squares). Dynamic programming over groups."""
    ranks = len(weights)
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}  # ranks used: (slowest, squares, counts)
    for done in range(1, groups + 1):
        after: dict[int, tuple[float, float, list[int]]] = {}
        for used, (slowest, squares, counts) in best.items():
            for stop in range(used + 1, ranks - (groups - done) + 1):
                if done == groups and stop != ranks:
                    continue
                mine = weights[used:stop]
                loads = [part / weight for part, weight in zip(largest_remainder(group, mine), mine, strict=True)]
                option = (
                    max(slowest, *loads),
                    squares + math.fsum(load * load for load in loads),
                    [*counts, stop - used],
                )
                if stop not in after or option < after[stop]:
                    after[stop] = option
        best = after
    return best[ranks][2]
