"""The keys and values of past positions, in blocks that sequences take one by one. Only this module and attention.py
know how they lie in memory."""

from __future__ import annotations

import functools
from itertools import chain
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ringlm.models.batch import Span


class Together(NamedTuple):
    """A span whose blocks follow one another: views by layer, made by one call for all."""

    room: tuple[Tensor, ...]  # (2, kv_heads, length, head_dim): the span's own positions
    through: tuple[Tensor, ...]  # (2, kv_heads, start + length, head_dim): all up to its last

    def keep(self, layer: int, new: Tensor) -> None:
        """Write the span's own keys and values (2, kv_heads, length, head_dim)."""
        self.room[layer].copy_(new)

    def past(self, layer: int, first: int) -> Tensor:
        """Keys and values of the positions from `first` up to the span's last: (2, kv_heads, positions, head_dim)."""
        return self.through[layer][:, :, first:]


class Scattered(NamedTuple):
    """A span whose blocks lie apart: its positions are gathered as they are read."""

    layers: tuple[Tensor, ...]  # (2, kv_heads, positions of the cache, head_dim)
    places: Tensor  # int64 (start + length,): where in the cache each position lies
    start: int

    def keep(self, layer: int, new: Tensor) -> None:
        """As Together's."""
        self.layers[layer].index_copy_(2, self.places[self.start :], new)

    def past(self, layer: int, first: int) -> Tensor:
        """As Together's, a copy."""
        return self.layers[layer].index_select(2, self.places[first:])


Kept: TypeAlias = Together | Scattered


class KVCache:
    """Room for `blocks` blocks of `block` positions in every layer, of this rank's key-value heads.

    One tensor (layers, 2, kv_heads, blocks * block, head_dim): blocks that follow one another are one run of
    positions. Pages of a CPU's memory are touched when first written.
    """

    def __init__(
        self,
        *,
        blocks: int,
        block: int,
        layers: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.blocks, self.block, self.head_dim = blocks, block, head_dim
        self.positions = blocks * block
        self._data = torch.empty((layers, 2, kv_heads, self.positions, head_dim), dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of address space; a CPU's memory is taken as positions are written."""
        return self._data.nbytes

    @property
    def layers(self) -> tuple[Tensor, ...]:
        """Per layer a view (2, kv_heads, positions, head_dim)."""
        return self._data.unbind(0)

    @functools.cached_property
    def addresses(self) -> list[tuple[int, int]]:
        """Per layer where keys and values begin, each (kv_heads, positions, head_dim)."""
        first = self._data.data_ptr()
        layer, half = (stride * self._data.element_size() for stride in self._data.stride()[:2])
        return [(first + index * layer, first + index * layer + half) for index in range(len(self._data))]

    def pages(self, span: Span) -> tuple[int, ...]:
        """The blocks of the span's sequence up to the span's last position. Raises IndexError for what lies outside
        the cache."""
        end = span.start + span.length
        blocks = span.blocks[: -(-end // self.block)]
        if not (span.start >= 0 and end <= len(blocks) * self.block and 0 <= min(blocks) <= max(blocks) < self.blocks):
            raise IndexError(
                f"positions {span.start} to {end} of blocks {list(blocks)} are outside a cache of {self.blocks} blocks "
                f"of {self.block} positions"
            )
        return blocks

    def runs(self, span: Span) -> list[tuple[int, int]]:
        """The same as (place of the first, count) of positions that follow one another."""
        blocks, size, end = self.pages(span), self.block, span.start + span.length
        first = blocks[0]
        if blocks == tuple(range(first, first + len(blocks))):
            return [(first * size, end)]
        runs: list[tuple[int, int]] = []
        for index, block in enumerate(blocks):
            count = min(size, end - index * size)
            if index and block == blocks[index - 1] + 1:
                place, before = runs[-1]
                runs[-1] = place, before + count
            else:
                runs.append((block * size, count))
        return runs

    def kept(self, span: Span) -> Kept:
        """Where the span's keys and values go, and its sequence's are read. Raises IndexError."""
        runs = self.runs(span)
        if len(runs) == 1:
            first, count = runs[0]
            mine = self._data[:, :, :, first : first + count]
            return Together(mine[:, :, :, span.start :].unbind(0), mine.unbind(0))
        places = list(chain.from_iterable(range(first, first + count) for first, count in runs))
        return Scattered(self.layers, torch.tensor(places, device=self._data.device), span.start)
