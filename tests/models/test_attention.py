"""Attention over the cache against a plain softmax, for spans of every kind in one batch, wherever their blocks lie."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.models.attention import AttentionStep
from ringlm.models.batch import Batch
from ringlm.models.cache import KVCache
from ringlm.models.kinds import AttentionKind, Rope
from ringlm.models.rope import RopeTable, rotate

SIZE = 6
BLOCK, PAGES = 4, 6  # positions of a block, blocks of a sequence
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5, torch.bfloat16: 0.05}


def reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int, kind: AttentionKind
) -> torch.Tensor:
    """(length, heads, size) over all positions (kv_heads, start + length, size), by definition."""
    length, heads, _ = queries.shape
    group = heads // max(1, keys.shape[0])
    out = torch.empty_like(queries)
    for row in range(length):
        for head in range(heads):
            seen = slice(max(0, start + row + 1 - (kind.window or 1000)), start + row + 1)
            scores = keys[head // group, seen] @ queries[row, head] * kind.scale
            if kind.soft_cap:
                scores = kind.soft_cap * (scores / kind.soft_cap).tanh()
            out[row, head] = scores.softmax(0) @ values[head // group, seen]
    return out


@settings(max_examples=100, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=4),
    kv_heads=st.integers(0, 3),
    group=st.integers(1, 3),
    rows=st.integers(1, 5),
    dtype=st.sampled_from(list(TOLERANCE)),
    window=st.sampled_from([None, 1, 2, 7, 23]),
    soft_cap=st.sampled_from([None, 0.7]),
    partial=st.sampled_from([1.0, 0.7, 0.0]),
    shuffle=st.none() | st.integers(0, 9),
)
def test_batches(
    spans: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    rows: int,
    dtype: torch.dtype,
    window: int | None,
    soft_cap: float | None,
    partial: float,
    shuffle: int | None,
) -> None:
    """float32 and bfloat16 take the compiled way where a span has one token, float64 torch's."""
    kind = AttentionKind(Rope(theta=100.0, partial=partial), 0.6, window, soft_cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringlm.models.attention.QUERY_ROWS", rows)
        check(spans, kv_heads, group, dtype, kind, shuffle)


def check(
    spans: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    dtype: torch.dtype,
    kind: AttentionKind,
    shuffle: int | None,
) -> None:
    """`shuffle` None: each sequence's blocks follow one another."""
    torch.manual_seed(0)
    heads = kv_heads * group
    blocks = list(range(len(spans) * PAGES))
    if shuffle is not None:
        random.Random(shuffle).shuffle(blocks)
    tables = [blocks[first : first + PAGES] for first in range(0, len(blocks), PAGES)]
    cache = cache_of(len(blocks), kv_heads, dtype, layers=2)
    other = AttentionKind(Rope(theta=5.0), 1.0)
    kinds = [(kind, RopeTable(kind.rope, SIZE, 24, dtype, torch.device("cpu"))) for kind in (other, kind)]
    pieces = [([0] * length, start, table) for table, (start, length) in zip(tables, spans, strict=True)]
    batch = Batch.of(pieces, [])
    cache._data[1] = torch.randn(cache._data.shape[1:], dtype=dtype)
    before = cache._data.clone()
    qkv = torch.randn(len(batch.tokens), heads + 2 * kv_heads, SIZE, dtype=dtype)
    turned = qkv.to(torch.float64, copy=True)
    rotate(turned[:, : heads + kv_heads], *(table.double() for table in kinds[1][1].at(batch.positions)))
    out = AttentionStep(batch, cache, kinds, heads, kv_heads)(1, 1, qkv)
    assert out.shape == (len(batch.tokens), heads * SIZE)
    close = {"atol": TOLERANCE[dtype], "rtol": TOLERANCE[dtype], "check_dtype": False}
    for table, span in zip(tables, batch.spans, strict=True):
        mine = turned[span.offset : span.offset + span.length].transpose(0, 1)  # (heads, length, size)
        places = torch.tensor([block * BLOCK + place for block in table for place in range(BLOCK)])
        past, new = places[: span.start], places[span.start : span.start + span.length]
        written = mine[heads:].reshape(2, kv_heads, span.length, SIZE)
        torch.testing.assert_close(cache._data[1, :, :, new], written, **close)
        keys, values = torch.cat((before[1, :, :, past].double(), cache._data[1, :, :, new].double()), 2)
        expected = reference(mine[:heads].transpose(0, 1), keys, values, span.start, kind)
        got = out[span.offset : span.offset + span.length].view(span.length, heads, SIZE)
        torch.testing.assert_close(got, expected, **close)
        before[1, :, :, new] = cache._data[1, :, :, new]
    assert torch.equal(cache._data[1], before[1])  # and nothing else is touched


def cache_of(blocks: int, kv_heads: int, dtype: torch.dtype, layers: int = 1) -> KVCache:
    return KVCache(
        blocks=blocks,
        block=BLOCK,
        layers=layers,
        kv_heads=kv_heads,
        head_dim=SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize(
    ("start", "length", "blocks"),
    [(-1, 1, [0]), (0, 5, [0]), (4, 1, [0]), (0, 1, [2]), (0, 1, [-1]), (0, 1, []), (7, 2, [1, 0])],
)
def test_positions_outside_the_cache(start: int, length: int, blocks: list[int]) -> None:
    (span,) = Batch.of([([0] * length, start, blocks)], []).spans
    with pytest.raises(IndexError, match="outside a cache of 2 blocks of 4 positions"):
        cache_of(2, 1, torch.float32).runs(span)


def test_a_position_outside_the_context_that_the_cache_has_room_for() -> None:
    kind = AttentionKind(Rope(theta=100.0), 1.0)
    table = RopeTable(kind.rope, SIZE, 5, torch.float32, torch.device("cpu"))
    cache = cache_of(2, 1, torch.float32)
    with pytest.raises(IndexError, match="position 5 is outside a context of 5"):
        AttentionStep(Batch.of([([0], 5, [0, 1])], []), cache, [(kind, table)], 1, 1)


def test_blocks_that_follow_one_another_are_one_run() -> None:
    cache = cache_of(9, 1, torch.float32)

    def runs(start: int, length: int, blocks: list[int]) -> list[tuple[int, int]]:
        return cache.runs(Batch.of([([0] * length, start, blocks)], []).spans[0])

    assert runs(6, 3, [2, 3, 4, 8]) == [(8, 9)]
    assert runs(6, 8, [2, 3, 4, 8]) == [(8, 12), (32, 2)]
    assert runs(15, 1, [8, 7, 1, 2]) == [(32, 4), (28, 4), (4, 8)]


def test_a_mask_is_no_larger_than_a_block_of_queries_and_what_it_sees() -> None:
    rope = Rope(theta=100.0)
    table = RopeTable(rope, SIZE, 3000, torch.float32, torch.device("cpu"))
    cache = cache_of(750, 1, torch.float32)

    def masks(length: int, start: int = 0) -> list[tuple[int, ...] | None]:
        kinds = [(AttentionKind(rope, 1.0), table), (AttentionKind(rope, 1.0, window=100), table)]
        step = AttentionStep(Batch.of([([0] * length, start, range(750))], []), cache, kinds, 2, 1)
        return [None if layers._mask is None else tuple(layers._mask.shape) for layers in step._kinds]

    assert masks(3000) == [(256, 2816 + 256), (256, 99 + 256)]
    assert masks(101) == [None, (256, 256)]
    assert masks(100) == [None, None]
    assert masks(1, start=99) == [None, None]
