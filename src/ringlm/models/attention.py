"""Causal attention over the cache for a batch of sequences of unequal lengths. Knows nothing of ranks: it sees
this rank's heads, `kv_heads` groups of equally many query heads.

One new token in float32 on the CPU is a single call of compiled code (attention_kernel.py). Elsewhere a group's
query heads become the rows of one product with its key-value head (`enable_gqa` is nine times slower on the CPU);
longer spans go in blocks of QUERY_ROWS positions, each against just the keys that it may see, so that a mask never
exceeds QUERY_ROWS x context, nor QUERY_ROWS x (QUERY_ROWS + window) where layers see a window only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.models.batch import Batch, Span
from ringlm.models.cache import KVCache
from ringlm.models.kinds import AttentionKind
from ringlm.models.rope import RopeTable, rotate

QUERY_ROWS: Final = 256


class Angles(NamedTuple):
    """What turns the batch's queries and keys, each (T, 1, rotary dimensions); of 0 dimensions, nothing turns."""

    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class _Several:
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

    def __call__(self, layer: int, layers: _Layers, qkv: Tensor, out: Tensor) -> None:
        size, row_bytes = qkv.shape[2], qkv.stride(0) * 4
        heads, result, scores = qkv.data_ptr(), out.data_ptr(), self._scores.data_ptr()
        cosines, sines, rotary = layers.turn
        for row, position, addresses in self._spans:
            self._attend(
                heads + row * row_bytes, cosines + row * rotary * 4, sines + row * rotary * 4, *addresses[layer],
                *self._heads, size, rotary, self._context, position, layers.window, layers.scale, layers.soft_cap,
                scores, result + row * out.stride(0) * 4,
            )  # fmt: skip


class _Layers:
    """What the layers of one kind share in a step: angles, and the mask."""

    def __init__(self, kind: AttentionKind, angles: Angles, spans: Sequence[Span], context: int) -> None:
        self.angles, self.scale, self.soft_cap = angles, kind.scale, kind.soft_cap or 0.0
        self.turn = angles.cos.data_ptr(), angles.sin.data_ptr(), angles.cos.shape[2]
        self.window = min(kind.window or context, context)  # positions that a token sees, itself included
        last = ((self.seen_before(_last_block(span)), span.length) for span in spans if span.length > 1)
        masked = [before for before, length in last if self._needs_mask(before, min(length, QUERY_ROWS))]
        self._before = max(masked, default=0)
        self._mask = self._band(angles.cos) if masked else None

    def seen_before(self, position: int) -> int:
        """How many keys before `position` a token there sees."""
        return min(position, self.window - 1)

    def mask(self, before: int, rows: int) -> Tensor | None:
        """For `rows` positions with `before` keys before the first, (rows, before + rows); None: just causal."""
        if self._mask is None or not self._needs_mask(before, rows):
            return None
        return self._mask[:rows, self._before - before : self._before + rows]

    def _needs_mask(self, before: int, rows: int) -> bool:
        return before > 0 or rows > self.window or self.soft_cap > 0

    def _band(self, like: Tensor) -> Tensor:
        """Row i sees the last `window` of the columns up to `_before` + i: a block with fewer keys before it takes
        the columns on the right."""
        shape = QUERY_ROWS, self._before + QUERY_ROWS
        late = like.new_full(shape, -torch.inf).triu_(self._before + 1)
        if self.window > shape[1]:
            return late
        return late.add_(like.new_full(shape, -torch.inf).tril_(self._before - self.window))


class AttentionStep:
    """What all layers of one forward share: views of the cache, and for each of `kinds`, given with its rope's table,
    angles and mask."""

    def __init__(
        self,
        batch: Batch,
        cache: KVCache,
        kinds: Sequence[tuple[AttentionKind, RopeTable]],
        query_heads: int,
        kv_heads: int,
    ) -> None:
        self.query_heads, self.kv_heads = query_heads, kv_heads
        tables = dict.fromkeys(table for _, table in kinds)
        angles = {table: Angles(*table.at(batch.positions)) for table in tables}
        self._kinds = [_Layers(kind, angles[table], batch.spans, cache.context) for kind, table in kinds]
        like = kinds[0][1].cos
        compiled = like.dtype is torch.float32 and like.is_cpu
        singles = [span for span in batch.spans if span.length == 1] if compiled else []
        self._singles = _Singles(singles, cache, query_heads, kv_heads) if singles else None
        self._several = [
            _Several(span, cache.past(span), cache.room(span)) for span in batch.spans if span not in singles
        ]

    def __call__(self, layer: int, kind: int, qkv: Tensor) -> Tensor:
        """qkv (T, query_heads + 2 * kv_heads, head_dim), which this overwrites, to (T, query_heads * head_dim), in
        layer `layer` of the cache, which is of the kind with index `kind`."""
        tokens, _, size = qkv.shape
        out = qkv.new_empty(tokens, self.query_heads * size)
        if not self.kv_heads:
            return out
        layers = self._kinds[kind]
        if self._singles is not None:
            self._singles(layer, layers, qkv, out)
        for several in self._several:
            rows = slice(several.span.offset, several.span.offset + several.span.length)
            self._one_span(layer, layers, several, qkv[rows], rows, out[rows])
        return out

    def _one_span(self, layer: int, layers: _Layers, several: _Several, qkv: Tensor, rows: slice, out: Tensor) -> None:
        """Several tokens of a sequence: turn them, keep their keys and values, and attend."""
        heads, (length, _, size) = self.query_heads, qkv.shape
        rotate(qkv[:, : heads + self.kv_heads], layers.angles.cos[rows], layers.angles.sin[rows])
        new = qkv[:, heads:].view(length, 2, self.kv_heads, size).permute(1, 2, 0, 3)  # (2, kv, length, size)
        several.room[layer].copy_(new)
        queries = qkv[:, :heads].view(length, self.kv_heads, -1, size)  # (length, kv, group, size)
        mixed = out.view(length, self.kv_heads, -1, size)
        past, start = several.past[layer], several.span.start
        if length == 1:
            keys, values = past[:, None, :, start - layers.seen_before(start) :].unbind(0)
            mixed.copy_(_attend(queries, keys, values, None, layers))  # (1, kv, group, size)
        else:
            self._many(queries, layers, start, past, mixed)

    def _many(self, queries: Tensor, layers: _Layers, start: int, past: Tensor, out: Tensor) -> None:
        """A span of several tokens, QUERY_ROWS at a time; keys are shared by a group through a stride of 0."""
        length, group = queries.shape[0], queries.shape[2]
        for first in range(0, length, QUERY_ROWS):
            rows = min(QUERY_ROWS, length - first)
            before = layers.seen_before(start + first)
            seen = slice(start + first - before, start + first + rows)
            keys, values = past[:, :, None, seen].expand(-1, -1, group, -1, -1).unbind(0)
            block = queries[first : first + rows].permute(1, 2, 0, 3)
            mixed = _attend(block, keys, values, layers.mask(before, rows), layers, causal=True)
            out[first : first + rows] = mixed.permute(2, 0, 1, 3)  # from (kv, group, rows, size)


def _last_block(span: Span) -> int:
    """The position at which the span's last block of queries begins."""
    return span.start + (span.length - 1) // QUERY_ROWS * QUERY_ROWS


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, layers: _Layers, causal: bool = False
) -> Tensor:
    """queries (…, rows, size) over keys and values (…, positions, size)."""
    if not layers.soft_cap:
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal and mask is None, scale=layers.scale
        )
    scores = (queries @ keys.transpose(-1, -2)).float().mul_(layers.scale / layers.soft_cap)
    scores.tanh_().mul_(layers.soft_cap)
    if mask is not None:
        scores.add_(mask)
    return scores.softmax(-1).to(values.dtype) @ values
