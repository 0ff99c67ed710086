"""Causal attention over the cache for a batch of sequences of unequal lengths. Knows nothing of ranks: it sees
this rank's heads, `kv_heads` groups of equally many query heads.

For one new token a group's query heads become the rows of one product with its key-value head
(`enable_gqa` is nine times slower on the CPU); longer spans go in blocks of QUERY_ROWS positions, each
against just the keys that it may see, so that a mask never exceeds QUERY_ROWS x context.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.models.batch import Batch, Span
from ringlm.models.cache import KVCache
from ringlm.models.rope import RopeTable, rotate

QUERY_ROWS: Final = 256


@dataclass(frozen=True)
class _Window:
    """A span with its views of the cache, by layer."""

    span: Span
    past: tuple[Tensor, ...]  # (2, kv_heads, start + length, head_dim)
    room: tuple[Tensor, ...]  # (2, kv_heads, length, head_dim)


class AttentionStep:
    """What all layers of one forward share: angles, views of the cache, and the mask."""

    def __init__(self, batch: Batch, cache: KVCache, rope: RopeTable, query_heads: int, kv_heads: int) -> None:
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.cos, self.sin = rope.at(batch.positions)
        self._windows = [_Window(span, cache.past(span), cache.room(span)) for span in batch.spans]
        self._single = len(batch.tokens) == 1
        self._before = max((_masked_before(span) for span in batch.spans), default=0)
        self._mask = self._lower_right() if any(_masked_before(span) for span in batch.spans) else None

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (T, query_heads + 2 * kv_heads, head_dim), which this overwrites, to (T, query_heads * head_dim)."""
        tokens, _, size = qkv.shape
        if not self.kv_heads:
            return qkv.new_empty(tokens, 0)
        heads = self.query_heads
        rotate(qkv[:, : heads + self.kv_heads], self.cos, self.sin)
        new = qkv[:, heads:].view(tokens, 2, self.kv_heads, size).permute(1, 2, 0, 3)  # (2, kv, T, size)
        queries = qkv[:, :heads].view(tokens, self.kv_heads, -1, size)  # (T, kv, group, size)
        if self._single:
            window = self._windows[0]
            window.room[layer].copy_(new)
            return _one(queries, window.past[layer]).view(1, -1)
        out = torch.empty_like(queries, memory_format=torch.contiguous_format)
        for window in self._windows:
            first, length = window.span.offset, window.span.length
            window.room[layer].copy_(new[:, :, first : first + length])
            if length == 1:
                out[first] = _one(queries[first : first + 1], window.past[layer])[0]
            else:
                self._many(queries, window, window.past[layer], out)
        return out.view(tokens, -1)

    def _many(self, queries: Tensor, window: _Window, past: Tensor, out: Tensor) -> None:
        """A span of several tokens, QUERY_ROWS at a time; keys are shared by a group through a stride of 0."""
        span, group = window.span, queries.shape[2]
        for first in range(0, span.length, QUERY_ROWS):
            rows = min(QUERY_ROWS, span.length - first)
            before = span.start + first
            at = span.offset + first
            keys, values = past[:, :, None, : before + rows].expand(-1, -1, group, -1, -1).unbind(0)
            mask = None
            if before:
                assert self._mask is not None
                mask = self._mask[:rows, self._before - before : self._before + rows]
            mixed = F.scaled_dot_product_attention(
                queries[at : at + rows].permute(1, 2, 0, 3), keys, values, attn_mask=mask, is_causal=mask is None
            )  # (kv, group, rows, size)
            out[at : at + rows] = mixed.permute(2, 0, 1, 3)

    def _lower_right(self) -> Tensor:
        """Row i sees columns up to `_before` + i: a block with fewer keys before it takes the columns on the right."""
        mask = torch.full(
            (QUERY_ROWS, self._before + QUERY_ROWS), -torch.inf, dtype=self.cos.dtype, device=self.cos.device
        )
        return mask.triu_(self._before + 1)


def _masked_before(span: Span) -> int:
    """The most keys that precede a block of this span that needs a mask; 0 where none does."""
    return 0 if span.length == 1 else span.start + (span.length - 1) // QUERY_ROWS * QUERY_ROWS


def _one(queries: Tensor, past: Tensor) -> Tensor:
    """One position: (1, kv, group, size) over past (2, kv, positions, size), all of which it sees."""
    keys, values = past.unsqueeze(1).unbind(0)
    return F.scaled_dot_product_attention(queries, keys, values)
