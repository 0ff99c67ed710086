"""Matrices packed in blocks of 32 codes, and their products on an accelerator. Knows the shard's rows and columns.

Rows lie one after another, as they come. A product unpacks a tile of rows at a time to the dtype of the activations:
right on every device that torch has. Where triton compiles (device_kernels.py), a few activations are multiplied
straight from the codes, which reads a third or half of a bfloat16 matrix, and unpacking takes one pass.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.parallel.prologue import Prologue
from ringlm.parallel.segment import BLOCK, Blocks, Held, unpack

log = logging.getLogger("ringlm")

FEW: Final = 4  # activations up to which products go straight from the codes; above, unpacking is faster
_TILE: Final = 1 << 24  # elements that are unpacked at a time: 32 MB, which an H100's cache holds
_ROWS: Final = 64  # a tile has a multiple of them: products of odd numbers of rows take several times as long


class DeviceSegment(Held):
    """Rows on `device`, one after another: those of `tensors`, as an earlier segment's `tensors()` were, or zeros, to
    be filled in any order. `like` has the form, and a row's blocks. Codes are uint8 (rows, blocks, 16 or 32)."""

    def __init__(
        self, like: Blocks, rows: int, device: torch.device, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        if tensors is None:
            given = {"codes": like.codes.view(torch.uint8), "scales": like.scales}
            given |= {} if like.minimums is None else {"minimums": like.minimums}
            tensors = {name: each.new_zeros((rows, *each.shape[1:]), device=device) for name, each in given.items()}
        here = {name: each.to(device) for name, each in tensors.items()}
        super().__init__(rows, here["codes"], here["scales"], here.get("minimums"))

    def fill(self, first: int, part: Blocks) -> None:
        """Take `part` as the rows from `first` on; the form is this segment's."""
        rows = slice(first, first + len(part.codes))
        self.codes[rows] = part.codes.view(torch.uint8)
        self.scales[rows] = part.scales
        if self.minimums is not None:
            assert part.minimums is not None
            self.minimums[rows] = part.minimums

    def unpack(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Those rows, in `dtype`, (n, blocks * 32)."""
        minimums = None if self.minimums is None else self.minimums[rows]
        held = self.codes[rows], self.scales[rows], minimums
        kernels = _kernels(self.codes.device)
        return unpack(*held).to(dtype) if kernels is None else kernels.unpack(*held, dtype)


class DevicePacked:
    """The `Storage` of a matrix (out, in) in packed rows, on an accelerator; activations are not rounded.

    `lead` of the first block's columns lie before the matrix, and some of the last one's behind it, where a shard's
    cut goes through a block: they take no part.
    """

    def __init__(self, segments: Sequence[DeviceSegment], columns: int, lead: int, dtype: torch.dtype) -> None:
        self._segments = [segment for segment in segments if segment.rows]
        self._inner, self._dtype = slice(lead, lead + columns), dtype
        self._rows = sum(segment.rows for segment in self._segments)
        self._products: list[Any] = []
        for segment in self._segments:
            kernels = _kernels(segment.codes.device)
            if kernels is not None:
                self._products.append(kernels.Product(segment.codes, segment.scales, segment.minimums, lead))

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def __call__(self, x: Tensor, bias: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        x = (x if prologue is None else prologue(x)).to(self._dtype)
        out = x.new_empty(x.shape[0], self._rows)
        if self._products and x.shape[0] <= FEW:
            self._from_codes(x, out)
        else:
            self._by_unpacking(x, out)
        return out if bias is None else out.add_(bias)

    def _from_codes(self, x: Tensor, out: Tensor) -> None:
        x = x if x.stride(1) == 1 else x.contiguous()
        first = 0
        for segment, product in zip(self._segments, self._products, strict=True):
            product(x, out[:, first : first + segment.rows])
            first += segment.rows

    def _by_unpacking(self, x: Tensor, out: Tensor) -> None:
        # Zeros meet what does not belong to the matrix: cut from the tile, it would lie at addresses that are slow.
        before, behind = self._inner.start, -self._inner.stop % BLOCK
        x = F.pad(x, (before, behind)) if before or behind else x
        height = max(1, _TILE // max(1, x.shape[1]) // _ROWS) * _ROWS
        first = 0
        for segment in self._segments:
            for top in range(0, segment.rows, height):
                rows = slice(top, min(top + height, segment.rows))
                out[:, first + rows.start : first + rows.stop] = F.linear(x, segment.unpack(rows, x.dtype))
            first += segment.rows

    def rows(self, indices: Tensor) -> Tensor:
        columns = self._inner.stop - self._inner.start
        out = torch.zeros(len(indices), columns, dtype=self._dtype, device=indices.device)
        first = 0
        for segment in self._segments:
            # Every segment unpacks as many rows as are asked for: their number is known without waiting for the device.
            local = indices - first
            inside = (local >= 0) & (local < segment.rows)
            found = segment.unpack(local.clamp(0, segment.rows - 1), self._dtype)[:, self._inner]
            out = torch.where(inside.unsqueeze(1), found, out)
            first += segment.rows
        return out


@functools.cache
def _kernels(device: torch.device) -> ModuleType | None:
    """device_kernels.py, where it works."""
    if device.type != "cuda":
        return None
    try:
        from ringlm.parallel import device_kernels

        device_kernels.unpack(
            torch.zeros(1, 1, 16, dtype=torch.uint8, device=device),
            torch.zeros(1, 1, dtype=torch.float16, device=device),
            None,
            torch.float16,
        )
    except Exception as error:  # noqa: BLE001 - without a C compiler or its own files triton fails in many ways
        log.warning("triton does not compile on %s (%s); packed weights are unpacked for every product", device, error)
        return None
    return device_kernels
