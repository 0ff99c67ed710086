"""Shard plans: everything is held once, heads form rectangles, shares follow the weights."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.errors import ConfigError
from ringlm.parallel.shard import Dimensions, Range, ShardPlan, largest_remainder, plan_shards


def sizes(
    query_heads: int = 9, kv_heads: int = 3, columns: int = 1536, vocabulary: int = 49152, expert_columns: int = 0
) -> Dimensions:
    return Dimensions(
        hidden_size=576,
        layers=30,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=64,
        columns=columns,
        vocabulary=vocabulary,
        context=8192,
        name="tiny",
        expert_columns=expert_columns,
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[Dimensions, int, list[float] | None]:
    kv_heads, group = draw(st.integers(1, 12)), draw(st.integers(1, 8))
    totals = (draw(st.integers(least, 5000)) for least in (1, 1, 0))
    dimensions = sizes(kv_heads * group, kv_heads, *totals)
    world_size = draw(st.integers(1, min(16, dimensions.query_heads)))
    share = st.one_of(st.just(0.0), st.floats(0.01, 100), st.integers(1, 8).map(float))
    weights = draw(st.none() | st.lists(share, min_size=world_size, max_size=world_size).filter(any))
    return dimensions, world_size, weights


def covered(ranges: list[Range]) -> list[int]:
    return [index for part in ranges for index in range(part.start, part.stop)]


@given(cases())
def test_every_part_is_held_once(case: tuple[Dimensions, int, list[float] | None]) -> None:
    dimensions, world_size, weights = case
    plan = plan_shards(dimensions, world_size, weights)
    assert plan.world_size == world_size
    assert covered([rank.query_heads for rank in plan.ranks]) == list(range(dimensions.query_heads))
    assert covered([rank.columns for rank in plan.ranks]) == list(range(dimensions.columns))
    assert covered([rank.expert_columns for rank in plan.ranks]) == list(range(dimensions.expert_columns))
    assert covered([rank.vocabulary for rank in plan.ranks]) == list(range(dimensions.vocabulary))
    assert {rank.layers for rank in plan.ranks} == {Range(0, dimensions.layers)}


@given(cases())
def test_heads_form_rectangles(case: tuple[Dimensions, int, list[float] | None]) -> None:
    dimensions, world_size, weights = case
    group = dimensions.query_heads // dimensions.kv_heads
    plan = plan_shards(dimensions, world_size, weights)
    for rank in plan.ranks:
        query, kv = rank.query_heads, rank.kv_heads
        assert bool(len(query)) == bool(len(kv))
        if len(kv):
            assert len(query) % len(kv) == 0
            assert query.start // group == kv.start
            assert (query.stop - 1) // group == kv.stop - 1
            assert len(kv) == 1 or len(query) == len(kv) * group
    active = world_size if weights is None else sum(weight > 0 for weight in weights)
    if active <= dimensions.kv_heads:
        assert covered([rank.kv_heads for rank in plan.ranks]) == list(range(dimensions.kv_heads))


@given(cases())
def test_shares_follow_the_weights(case: tuple[Dimensions, int, list[float] | None]) -> None:
    dimensions, world_size, weights = case
    plan = plan_shards(dimensions, world_size, weights)
    shares = weights or [1.0] * world_size
    for rank, weight in zip(plan.ranks, shares, strict=True):
        for part, total in ((rank.columns, dimensions.columns), (rank.vocabulary, dimensions.vocabulary)):
            ideal = total * weight / sum(shares)
            assert len(part) <= max(ideal + 1, ideal * 1.04 + 1)
            assert weight or not len(part)
        assert weight or not len(rank.query_heads)
    if weights is None:
        assert all(len(rank.query_heads) for rank in plan.ranks)
        if dimensions.columns >= world_size:
            assert all(len(rank.columns) for rank in plan.ranks)


@given(cases())
def test_a_plan_travels(case: tuple[Dimensions, int, list[float] | None]) -> None:
    plan = plan_shards(*case)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=ShardPlan) == plan


def heads(plan: ShardPlan) -> list[tuple[int, int]]:
    return [(len(rank.query_heads), len(rank.kv_heads)) for rank in plan.ranks]


def test_three_key_value_heads() -> None:
    assert heads(plan_shards(sizes(), 2)) == [(6, 2), (3, 1)]
    assert heads(plan_shards(sizes(), 3)) == [(3, 1)] * 3
    assert heads(plan_shards(sizes(), 4)) == [(3, 1), (3, 1), (2, 1), (1, 1)]
    assert heads(plan_shards(sizes(), 9)) == [(1, 1)] * 9
    assert heads(plan_shards(sizes(), 2, [1, 2])) == [(3, 1), (6, 2)]
    assert heads(plan_shards(sizes(), 3, [2, 0, 1])) == [(6, 2), (0, 0), (3, 1)]
    assert heads(plan_shards(sizes(), 4, [1, 2, 3, 3])) == [(1, 1), (2, 1), (3, 1), (3, 1)]


def test_groups_go_where_they_balance() -> None:
    assert heads(plan_shards(sizes(8, 2), 8)) == [(1, 1)] * 8
    assert heads(plan_shards(sizes(8, 2), 6, [1, 1, 1, 1, 2, 2])) == [(1, 1)] * 4 + [(2, 1)] * 2


def test_columns_keep_to_units_where_that_is_fair() -> None:
    assert [len(rank.columns) for rank in plan_shards(sizes(columns=8192), 3).ranks] == [2752, 2720, 2720]
    assert [len(rank.columns) for rank in plan_shards(sizes(columns=50), 3).ranks] == [17, 17, 16]
    assert [len(rank.columns) for rank in plan_shards(sizes(columns=1000), 2).ranks] == [512, 488]


@given(st.integers(0, 10000), st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(any))
def test_largest_remainder(total: int, weights: list[float]) -> None:
    parts = largest_remainder(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        quota = total * (weight / sum(weights))
        assert quota - 1.001 < part < quota + 1.001


def test_what_cannot_be_planned() -> None:
    with pytest.raises(ConfigError) as caught:
        plan_shards(sizes(4, 2), 6)
    assert str(caught.value) == (
        "world size 6 needs at least 6 query heads; model 'tiny' has 4. Use --world-size 4 or fewer."
    )
    for weights, message in (
        ([1.0], "--split 1 has 1 weights; world size 2 needs one a rank"),
        ([0.0, 0.0], "one of them above 0"),
        ([-1.0, 2.0], "weights must be 0 or more"),
        ([float("nan"), 1.0], "weights must be 0 or more"),
        ([float("inf"), 1.0], "weights must be 0 or more"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_shards(sizes(), 2, weights)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        plan_shards(sizes(), 0)
