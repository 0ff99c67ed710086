"""Attention over the cache against a plain softmax, for spans of every kind in one batch."""

from __future__ import annotations

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
    dtype=st.sampled_from([torch.float32, torch.float64]),
    window=st.sampled_from([None, 1, 2, 7, 23]),
    soft_cap=st.sampled_from([None, 0.7]),
    partial=st.sampled_from([1.0, 0.7, 0.0]),
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
) -> None:
    """float32 takes the compiled way where a span has one token, float64 torch's."""
    kind = AttentionKind(Rope(theta=100.0, partial=partial), 0.6, window, soft_cap)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringlm.models.attention.QUERY_ROWS", rows)
        check(spans, kv_heads, group, dtype, kind)


def check(spans: list[tuple[int, int]], kv_heads: int, group: int, dtype: torch.dtype, kind: AttentionKind) -> None:
    torch.manual_seed(0)
    heads = kv_heads * group
    cache = KVCache(
        blocks=len(spans),
        layers=2,
        kv_heads=kv_heads,
        context=24,
        head_dim=SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    other = AttentionKind(Rope(theta=5.0), 1.0)
    kinds = [(kind, RopeTable(kind.rope, SIZE, 24, dtype, torch.device("cpu"))) for kind in (other, kind)]
    batch = Batch.of([([0] * length, start, [block]) for block, (start, length) in enumerate(spans)], [])
    filled = torch.randn(len(spans), 2, kv_heads, 24, SIZE, dtype=dtype)
    cache._data[:, 1] = filled  # layer 1
    qkv = torch.randn(len(batch.tokens), heads + 2 * kv_heads, SIZE, dtype=dtype)
    turned = qkv.clone()
    rotate(turned[:, : heads + kv_heads], *kinds[1][1].at(batch.positions))
    out = AttentionStep(batch, cache, kinds, heads, kv_heads)(1, 1, qkv)
    assert out.shape == (len(batch.tokens), heads * SIZE)
    for block, span in enumerate(batch.spans):
        mine = turned[span.offset : span.offset + span.length].transpose(0, 1)  # (heads, length, size)
        keys, values = (filled[block, half, :, : span.start] for half in (0, 1))
        keys = torch.cat((keys, mine[heads : heads + kv_heads]), 1)
        values = torch.cat((values, mine[heads + kv_heads :]), 1)
        expected = reference(mine[:heads].transpose(0, 1), keys, values, span.start, kind)
        got = out[span.offset : span.offset + span.length].view(span.length, heads, SIZE)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(cache._data[block, 1, 0, :, span.start : span.start + span.length], keys[:, span.start :])


def test_a_mask_is_no_larger_than_a_block_of_queries_and_what_it_sees() -> None:
    rope = Rope(theta=100.0)
    table = RopeTable(rope, SIZE, 3000, torch.float32, torch.device("cpu"))
    cache = KVCache(
        blocks=1, layers=1, kv_heads=1, context=3000, head_dim=SIZE, dtype=torch.float32, device=torch.device("cpu")
    )

    def masks(length: int, start: int = 0) -> list[tuple[int, ...] | None]:
        kinds = [(AttentionKind(rope, 1.0), table), (AttentionKind(rope, 1.0, window=100), table)]
        step = AttentionStep(Batch.of([([0] * length, start, [0])], []), cache, kinds, 2, 1)
        return [None if layers._mask is None else tuple(layers._mask.shape) for layers in step._kinds]

    assert masks(3000) == [(256, 2816 + 256), (256, 99 + 256)]
    assert masks(101) == [None, (256, 256)]
    assert masks(100) == [None, None]
    assert masks(1, start=99) == [None, None]
