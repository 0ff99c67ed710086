"""Attention over the cache against a plain softmax, for spans of every kind in one batch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.models.attention import AttentionStep
from ringlm.models.batch import Batch
from ringlm.models.cache import KVCache
from ringlm.models.config import Rope
from ringlm.models.rope import RopeTable, rotate

SIZE = 6


def reference(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, start: int) -> torch.Tensor:
    """(length, heads, size) over all positions (kv_heads, start + length, size), by definition."""
    length, heads, _ = queries.shape
    group = heads // max(1, keys.shape[0])
    out = torch.empty_like(queries)
    for row in range(length):
        for head in range(heads):
            seen = start + row + 1
            scores = keys[head // group, :seen] @ queries[row, head] / math.sqrt(SIZE)
            out[row, head] = scores.softmax(0) @ values[head // group, :seen]
    return out


@settings(max_examples=50, deadline=None)
@given(
    spans=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), min_size=1, max_size=4),
    kv_heads=st.integers(0, 3),
    group=st.integers(1, 3),
    rows=st.integers(1, 5),
)
def test_batches(spans: list[tuple[int, int]], kv_heads: int, group: int, rows: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringlm.models.attention.QUERY_ROWS", rows)
        check(spans, kv_heads, group)


def check(spans: list[tuple[int, int]], kv_heads: int, group: int) -> None:
    torch.manual_seed(0)
    heads = kv_heads * group
    cache = KVCache(
        blocks=len(spans),
        layers=2,
        kv_heads=kv_heads,
        context=24,
        head_dim=SIZE,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    rope = RopeTable(Rope(theta=100.0), SIZE, 24, torch.float32, torch.device("cpu"))
    batch = Batch.of([([0] * length, start, [block]) for block, (start, length) in enumerate(spans)], [])
    filled = torch.randn(len(spans), 2, kv_heads, 24, SIZE)
    cache._data[:, 1] = filled  # layer 1
    qkv = torch.randn(len(batch.tokens), heads + 2 * kv_heads, SIZE)
    turned = qkv.clone()
    rotate(turned[:, : heads + kv_heads], *rope.at(batch.positions))
    out = AttentionStep(batch, cache, rope, heads, kv_heads)(1, qkv)
    assert out.shape == (len(batch.tokens), heads * SIZE)
    for block, span in enumerate(batch.spans):
        mine = turned[span.offset : span.offset + span.length].transpose(0, 1)  # (heads, length, size)
        keys, values = (filled[block, half, :, : span.start] for half in (0, 1))
        keys = torch.cat((keys, mine[heads : heads + kv_heads]), 1)
        values = torch.cat((values, mine[heads + kv_heads :]), 1)
        expected = reference(mine[:heads].transpose(0, 1), keys, values, span.start)
        got = out[span.offset : span.offset + span.length].view(span.length, heads, SIZE)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(cache._data[block, 1, 0, :, span.start : span.start + span.length], keys[:, span.start :])


def test_a_mask_is_no_larger_than_a_block_of_queries() -> None:
    rope = RopeTable(Rope(theta=100.0), SIZE, 3000, torch.float32, torch.device("cpu"))
    cache = KVCache(
        blocks=1, layers=1, kv_heads=1, context=3000, head_dim=SIZE, dtype=torch.float32, device=torch.device("cpu")
    )
    step = AttentionStep(Batch.of([([0] * 3000, 0, [0])], []), cache, rope, 2, 1)
    assert step._mask is not None
    assert step._mask.shape[0] == 256
    assert AttentionStep(Batch.of([([0] * 100, 0, [0])], []), cache, rope, 2, 1)._mask is None
    assert AttentionStep(Batch.of([([0], 99, [0])], []), cache, rope, 2, 1)._mask is None
