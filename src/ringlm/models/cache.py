"""The keys and values of past positions. Only this module and attention.py know how they lie in memory:
for now a block is one slot that holds a whole sequence."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringlm.models.batch import Span


class KVCache:
    """Room for `blocks` sequences of `context` positions in every layer, of this rank's key-value heads.

    One tensor (blocks, layers, 2, kv_heads, context, head_dim), a block's memory in one piece, so that one
    call makes the views of a sequence in all layers. Pages are touched when first written.
    """

    def __init__(
        self,
        *,
        blocks: int,
        layers: int,
        kv_heads: int,
        context: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks = blocks
        self.context = context
        shape = (blocks, layers, 2, kv_heads, context, head_dim)
        self._data = torch.empty(shape, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of address space; memory is taken as positions are written."""
        return self._data.nbytes

    def past(self, span: Span) -> tuple[Tensor, ...]:
        """Per layer a view (2, kv_heads, start + length, head_dim): keys and values up to the span's last position."""
        return self._data[self._slot(span), :, :, :, : span.start + span.length].unbind(0)

    def room(self, span: Span) -> tuple[Tensor, ...]:
        """Per layer a view (2, kv_heads, length, head_dim): where the span's own keys and values go."""
        return self._data[self._slot(span), :, :, :, span.start : span.start + span.length].unbind(0)

    def addresses(self, span: Span) -> list[tuple[int, int]]:
        """Per layer where the sequence's keys and values begin, each (kv_heads, context, head_dim)."""
        block = self._slot(span)
        _, layers, _, *rest = self._data.shape
        size = math.prod(rest) * self._data.element_size()
        first = self._data.data_ptr() + block * layers * 2 * size
        return [(first + layer * 2 * size, first + (layer * 2 + 1) * size) for layer in range(layers)]

    def _slot(self, span: Span) -> int:
        (block,) = span.blocks
        if not (0 <= block < self.blocks and 0 <= span.start <= self.context - span.length):
            raise IndexError(
                f"positions {span.start} to {span.start + span.length} of block {block} are outside a cache of "
                f"{self.blocks} blocks of {self.context} positions"
            )
        return block
