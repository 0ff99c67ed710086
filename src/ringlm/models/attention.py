"""Causal attention over the cache for a batch of sequences of unequal lengths. Knows nothing of ranks: it sees
this rank's heads, `kv_heads` groups of equally many query heads.

One new token each of some sequences is a single call, on the CPU of compiled code (attention_kernel.py), elsewhere of
torch's, over keys gathered from all of them. A single sequence needs no gathering: its group's query heads become the
rows of one product with the key-value head (`enable_gqa` is nine times slower on the CPU). Longer spans go in blocks of
QUERY_ROWS positions, each against just the keys that it may see, so that a mask never exceeds QUERY_ROWS x context, nor
QUERY_ROWS x (QUERY_ROWS + window) where layers see a window only.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.models.batch import Batch, Span
from ringlm.models.cache import Kept, KVCache
from ringlm.models.kinds import AttentionKind
from ringlm.models.rope import RopeTable, rotate

QUERY_ROWS: Final = 256
_COMPILED: Final = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}  # and how the kernel is told


class Angles(NamedTuple):
    """What turns the batch's queries and keys, each (T, 1, rotary dimensions); of 0 dimensions, nothing turns."""

    cos: Tensor
    sin: Tensor


class _Singles:
    """The spans of one token, where compiled code does all that they need in one call."""

    def __init__(self, spans: Sequence[Span], cache: KVCache, like: Tensor, heads: tuple[int, int]) -> None:
        from ringlm.models.attention_kernel import attend

        self._attend, self._like = attend, _COMPILED[like.dtype]
        query_heads, kv_heads = heads
        self._heads, self._positions = heads, cache.positions
        self._caches = cache.addresses if kv_heads else []
        tokens, runs = list[int](), list[int]()
        for span in spans:
            mine = cache.runs(span)
            tokens += span.offset, span.start, len(runs) // 2, len(mine)
            runs += chain.from_iterable(mine)
        longest = max(span.start for span in spans)
        if longest >= len(like):
            raise IndexError(f"position {longest} is outside a context of {len(like)} positions")
        size = 2 * (query_heads + kv_heads) * cache.head_dim + query_heads // max(1, kv_heads) * (longest + 8)
        # By torch, as the batch's tokens are: code that a step has run before is not fetched from memory once more.
        self._words, self._scratch = torch.tensor(tokens + runs), torch.empty(size, dtype=torch.float32)
        first = self._words.data_ptr()
        self._given = first, len(spans), first + len(tokens) * self._words.itemsize
        self._room = self._scratch.data_ptr()

    def __call__(self, layer: int, layers: _Layers, qkv: Tensor, out: Tensor) -> None:
        rows, stride, size = qkv.shape[0], qkv.stride(0), qkv.shape[2]
        self._attend(
            qkv.data_ptr(), rows, stride, *layers.turn, *self._caches[layer], *self._given, *self._heads, size,
            self._positions, layers.window, layers.scale, layers.soft_cap, self._room, out.data_ptr(), self._like,
        )  # fmt: skip


class _Gathered:
    """The spans of one token where there is no compiled code: one call for all, over copies of what they see."""

    def __init__(self, spans: Sequence[Span], cache: KVCache, kinds: Sequence[_Layers], heads: tuple[int, int]) -> None:
        device = kinds[0].angles.cos.device
        self._layers, self._heads = cache.layers, sum(heads)
        self._kv_heads = heads[1]
        pages = torch.nn.utils.rnn.pad_sequence([torch.tensor(cache.pages(span)) for span in spans], batch_first=True)
        pages = pages.to(device)
        self._rows = torch.tensor([span.offset for span in spans], device=device)
        last = torch.tensor([span.start for span in spans], device=device)[:, None]
        longest = max(span.start for span in spans) + 1
        self._new = self._places(pages, last, cache.block)[:, 0]
        self._kinds = {}
        for kind in kinds:
            seen = min(longest, kind.window)
            positions = last - torch.arange(seen - 1, -1, -1, device=device)  # (n, seen), before the first: negative
            mask = torch.zeros(positions.shape, dtype=kind.angles.cos.dtype, device=device)
            mask.masked_fill_(positions < 0, -torch.inf)
            places = self._places(pages, positions.clamp_(min=0), cache.block).flatten()
            angles = kind.angles.cos[self._rows], kind.angles.sin[self._rows]
            self._kinds[kind] = places, mask[:, None, None], angles

    def __call__(self, layer: int, layers: _Layers, qkv: Tensor, out: Tensor) -> None:
        places, mask, angles = self._kinds[layers]
        mine = qkv[self._rows]  # (n, query_heads + 2 * kv_heads, size)
        count, _, size = mine.shape
        kv_heads, queries = self._kv_heads, self._heads - self._kv_heads
        rotate(mine[:, : self._heads], *angles)
        cache = self._layers[layer]
        cache.index_copy_(2, self._new, mine[:, queries:].view(count, 2, kv_heads, size).permute(1, 2, 0, 3))
        past = cache.index_select(2, places).view(2, kv_heads, count, -1, size)
        keys, values = past.transpose(1, 2).unbind(0)  # (n, kv, seen, size)
        mixed = _attend(mine[:, :queries].view(count, kv_heads, -1, size), keys, values, mask, layers)
        out[self._rows] = mixed.reshape(count, -1)

    @staticmethod
    def _places(pages: Tensor, positions: Tensor, block: int) -> Tensor:
        """Where in the cache the sequences' positions (n, any) lie; pages (n, most blocks)."""
        return pages.gather(1, positions // block) * block + positions % block


class _Layers:
    """What the layers of one kind share in a step: angles, and the mask."""

    def __init__(self, kind: AttentionKind, table: RopeTable, batch: Batch, positions: int) -> None:
        self._table, self._positions = table, batch.positions
        self.scale, self.soft_cap, spans = kind.scale, kind.soft_cap or 0.0, batch.spans
        self.turn = table.cos.data_ptr(), table.sin.data_ptr(), *table.cos.shape  # for compiled code
        self.window = min(kind.window or positions, positions)  # positions that a token sees, itself included
        last = ((self.seen_before(_last_block(span)), span.length) for span in spans if span.length > 1)
        masked = [before for before, length in last if self._needs_mask(before, min(length, QUERY_ROWS))]
        self._before = max(masked, default=0)
        self._mask = self._band(table.cos) if masked else None

    @functools.cached_property
    def angles(self) -> Angles:
        """The batch's, which compiled code takes from the table by itself."""
        return Angles(*self._table.at(self._positions))

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
    """What all layers of one forward share: where the cache has the spans, and for each of `kinds`, given with its
    rope's table, angles and mask."""

    def __init__(
        self,
        batch: Batch,
        cache: KVCache,
        kinds: Sequence[tuple[AttentionKind, RopeTable]],
        query_heads: int,
        kv_heads: int,
    ) -> None:
        self.query_heads, self.kv_heads = query_heads, kv_heads
        self._kinds = [_Layers(kind, table, batch, cache.positions) for kind, table in kinds]
        like, heads = kinds[0][1].cos, (query_heads, kv_heads)
        singles = [span for span in batch.spans if span.length == 1]
        self._singles: _Singles | _Gathered | None = None
        if singles and like.is_cpu and like.dtype in _COMPILED:
            self._singles = _Singles(singles, cache, like, heads)
        elif len(singles) > 1:
            self._singles = _Gathered(singles, cache, self._kinds, heads)
        rest = batch.spans if self._singles is None else [span for span in batch.spans if span.length > 1]
        self._several = [(span, cache.kept(span)) for span in rest]  # where the cache has them

    def __call__(self, layer: int, kind: int, qkv: Tensor) -> Tensor:
        """qkv (T, query_heads + 2 * kv_heads, head_dim), which this may overwrite, to (T, query_heads * head_dim), in
        layer `layer` of the cache, which is of the kind with index `kind`."""
        tokens, _, size = qkv.shape
        out = qkv.new_empty(tokens, self.query_heads * size)
        if not self.kv_heads:
            return out
        layers = self._kinds[kind]
        if self._singles is not None:
            self._singles(layer, layers, qkv, out)
        for span, kept in self._several:
            rows = slice(span.offset, span.offset + span.length)
            self._one_span(layer, layers, kept, span.start, qkv[rows], rows, out[rows])
        return out

    def _one_span(
        self, layer: int, layers: _Layers, kept: Kept, start: int, qkv: Tensor, rows: slice, out: Tensor
    ) -> None:
        """A sequence's tokens: turn them, keep their keys and values, and attend."""
        heads, (length, _, size) = self.query_heads, qkv.shape
        rotate(qkv[:, : heads + self.kv_heads], layers.angles.cos[rows], layers.angles.sin[rows])
        new = qkv[:, heads:].view(length, 2, self.kv_heads, size).permute(1, 2, 0, 3)  # (2, kv, length, size)
        kept.keep(layer, new)
        queries = qkv[:, :heads].view(length, self.kv_heads, -1, size)  # (length, kv, group, size)
        mixed = out.view(length, self.kv_heads, -1, size)
        before = layers.seen_before(start)
        past = kept.past(layer, start - before)  # (2, kv, before + length, size)
        if length == 1:
            keys, values = past[:, None].unbind(0)
            mixed.copy_(_attend(queries, keys, values, None, layers))  # (1, kv, group, size)
        else:
            self._many(queries, layers, start, past, mixed)

    def _many(self, queries: Tensor, layers: _Layers, start: int, past: Tensor, out: Tensor) -> None:
        """A span of several tokens, QUERY_ROWS at a time; keys are shared by a group through a stride of 0."""
        length, group = queries.shape[0], queries.shape[2]
        behind = past.shape[2] - length  # how many keys there are before `start`
        for first in range(0, length, QUERY_ROWS):
            rows = min(QUERY_ROWS, length - first)
            before = layers.seen_before(start + first)
            seen = slice(behind + first - before, behind + first + rows)
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
