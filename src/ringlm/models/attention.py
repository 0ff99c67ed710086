"""Causal attention over the cache for a batch of sequences of unequal lengths. Knows nothing of ranks: it sees
this rank's heads, `kv_heads` groups of equally many query heads.

One new token in float32 on the CPU is a single call of compiled code (attention_kernel.py). Elsewhere a group's
query heads become the rows of one product with its key-value head (`enable_gqa` is nine times slower on the CPU);
longer spans go in blocks of QUERY_ROWS positions, each against just the keys that it may see, so that a mask never
exceeds QUERY_ROWS x context.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """A span of several tokens, with its views of the cache by layer."""

    span: Span
    past: tuple[Tensor, ...]  # (2, kv_heads, start + length, head_dim)
    room: tuple[Tensor, ...]  # (2, kv_heads, length, head_dim)


class _Singles:
    """The spans of one token, where compiled code does all that a token needs in one call."""

    def __init__(self, spans: Sequence[Span], cache: KVCache, query_heads: int, kv_heads: int) -> None:
        from ringlm.models.attention_kernel import attend

        self._attend, self._context = attend, cache.context
        self._heads = query_heads, kv_heads
        self._spans = [(span.offset, span.start, cache.addresses(span)) for span in spans]
        longest = max((span.start for span in spans), default=0)
        group = query_heads // kv_heads if kv_heads else 0
        self._scores = torch.empty(group * (longest + 8))

    def __call__(self, layer: int, qkv: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
        size, row_bytes = qkv.shape[2], qkv.stride(0) * 4
        heads, angles, result = qkv.data_ptr(), size * 4, out.data_ptr()
        cosines, sines, scores = cos.data_ptr(), sin.data_ptr(), self._scores.data_ptr()
        for row, position, addresses in self._spans:
            self._attend(
                heads + row * row_bytes, cosines + row * angles, sines + row * angles, *addresses[layer],
                *self._heads, size, self._context, position, size**-0.5, scores, result + row * out.stride(0) * 4,
            )  # fmt: skip


class AttentionStep:
    """What all layers of one forward share: angles, views of the cache, and the mask."""

    def __init__(self, batch: Batch, cache: KVCache, rope: RopeTable, query_heads: int, kv_heads: int) -> None:
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self.cos, self.sin = rope.at(batch.positions)
        compiled = self.cos.dtype is torch.float32 and self.cos.is_cpu
        singles = [span for span in batch.spans if span.length == 1] if compiled else []
        self._singles = _Singles(singles, cache, query_heads, kv_heads) if singles else None
        self._windows = [
            _Window(span, cache.past(span), cache.room(span)) for span in batch.spans if span not in singles
        ]
        self._before = max((_masked_before(span) for span in batch.spans), default=0)
        self._mask = self._lower_right() if any(_masked_before(span) for span in batch.spans) else None

    def __call__(self, layer: int, qkv: Tensor) -> Tensor:
        """qkv (T, query_heads + 2 * kv_heads, head_dim), which this overwrites, to (T, query_heads * head_dim)."""
        tokens, _, size = qkv.shape
        out = qkv.new_empty(tokens, self.query_heads * size)
        if not self.kv_heads:
            return out
        if self._singles is not None:
            self._singles(layer, qkv, self.cos, self.sin, out)
        for window in self._windows:
            rows = slice(window.span.offset, window.span.offset + window.span.length)
            self._window(layer, window, qkv[rows], rows, out[rows])
        return out

    def _window(self, layer: int, window: _Window, qkv: Tensor, rows: slice, out: Tensor) -> None:
        """Several tokens of a sequence: turn them, keep their keys and values, and attend."""
        heads, (length, _, size) = self.query_heads, qkv.shape
        rotate(qkv[:, : heads + self.kv_heads], self.cos[rows], self.sin[rows])
        new = qkv[:, heads:].view(length, 2, self.kv_heads, size).permute(1, 2, 0, 3)  # (2, kv, length, size)
        window.room[layer].copy_(new)
        queries = qkv[:, :heads].view(length, self.kv_heads, -1, size)  # (length, kv, group, size)
        mixed = out.view(length, self.kv_heads, -1, size)
        if length == 1:
            mixed.copy_(_one(queries, window.past[layer]))
        else:
            self._many(queries, window, window.past[layer], mixed)

    def _many(self, queries: Tensor, window: _Window, past: Tensor, out: Tensor) -> None:
        """A span of several tokens, QUERY_ROWS at a time; keys are shared by a group through a stride of 0."""
        span, group = window.span, queries.shape[2]
        for first in range(0, span.length, QUERY_ROWS):
            rows = min(QUERY_ROWS, span.length - first)
            before = span.start + first
            keys, values = past[:, :, None, : before + rows].expand(-1, -1, group, -1, -1).unbind(0)
            mask = None
            if before:
                assert self._mask is not None
                mask = self._mask[:rows, self._before - before : self._before + rows]
            mixed = F.scaled_dot_product_attention(
                queries[first : first + rows].permute(1, 2, 0, 3), keys, values, attn_mask=mask, is_causal=mask is None
            )  # (kv, group, rows, size)
            out[first : first + rows] = mixed.permute(2, 0, 1, 3)

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
