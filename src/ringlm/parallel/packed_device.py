"""Matrices packed in blocks of 32 codes, and their products on an accelerator. Knows the shard's rows and columns.

Rows lie one after another, as they come. A product unpacks a tile of rows at a time to the dtype of the activations:
right on every device that torch has. Where triton compiles (device_kernels.py), a few activations are multiplied
straight from the codes, which reads a third or half of a bfloat16 matrix, and unpacking takes one pass.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.parallel import unpacking
from ringlm.parallel.prologue import Prologue

if TYPE_CHECKING:
    from ringlm.parallel.packed import Blocks  # with it comes a compiler

log = logging.getLogger("ringlm")

FEW: Final = 4  # activations up to which products go straight from the codes; above, unpacking is faster
_TILE: Final = 1 << 24  # elements that are unpacked at a time: 32 MB, which an H100's cache holds
_ROWS: Final = 64  # a tile has a multiple of them: products of odd numbers of rows take several times as long


class DeviceSegment:
    """`rows` consecutive rows of one form on `device`: those of `tensors`, as an earlier segment's `tensors()` were,
    or zeros, to be filled in any order. `like` has the form, and a row's blocks."""

    def __init__(
        self, like: Blocks, rows: int, device: torch.device, tensors: Mapping[str, Tensor] | None = None
    ) -> None:
        self.rows = rows
        if tensors is None:
            figures = like.scales.shape[1]
            tensors = made = {
                "codes": torch.zeros(rows, *like.codes.shape[1:], dtype=torch.uint8, device=device),
                "scales": torch.zeros(rows, figures, dtype=torch.float16, device=device),
            }
            if like.minimums is not None:
                made["minimums"] = torch.zeros(rows, figures, dtype=torch.float16, device=device)
        self.codes, self.scales = tensors["codes"].to(device), tensors["scales"].to(device)
        self.minimums = tensors["minimums"].to(device) if "minimums" in tensors else None

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name: codes uint8 (rows, blocks, 16 or 32), scales and minimums float16 (rows, blocks);
        a block as in parallel/packed.py."""
        held = {"codes": self.codes, "scales": self.scales}
        return held if self.minimums is None else held | {"minimums": self.minimums}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def fill(self, first: int, part: Blocks) -> None:
        """Take `part` as the rows from `first` on; the form is this segment's."""
        rows = slice(first, first + len(part.codes))
        self.codes[rows] = part.codes.view(torch.uint8)
        self.scales[rows] = part.scales
        if self.minimums is not None:
            assert part.minimums is not None
            self.minimums[rows] = part.minimums

    def cut(self, first: int, rows: int) -> DeviceSegment:
        """Rows [first, first + rows) as a segment of their own, in the same memory."""
        part, inside = copy.copy(self), slice(first, first + rows)
        part.rows, part.codes, part.scales = rows, self.codes[inside], self.scales[inside]
        part.minimums = None if self.minimums is None else self.minimums[inside]
        return part

    def unpack(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """Those rows, in `dtype`, (n, blocks * 32)."""
        minimums = None if self.minimums is None else self.minimums[rows]
        held = self.codes[rows], self.scales[rows], minimums
        kernels = _kernels(self.codes.device)
        return unpacking.unpack(*held).to(dtype) if kernels is None else kernels.unpack(*held, dtype)


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
        x = x if prologue is None else prologue(x)
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
        before, behind = self._inner.start, -self._inner.stop % unpacking.BLOCK
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
