"""What an adapter adds to a rank's product: low-rank products beside it, arXiv:2106.09685. Knows no files.

Cut as the layer is: a column-parallel layer's rank has all of A and its rows of B, a row-parallel one's its columns of
A and all of B, so that its share is in the partial sum before the one reduction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ringlm.parallel.linear import Dense, Product
from ringlm.parallel.prologue import Prologue


class Up(NamedTuple):
    """One adapter's way out: scale * matrix times `ranks` of what comes down is added to `outputs`."""

    outputs: slice
    ranks: slice
    matrix: Tensor  # (ranks, outputs), contiguous: a quarter faster than (outputs, ranks) for one token on a CPU
    scale: float


class Adapted:
    """`base`, to which adapters are added: `down` (ranks of all, in), then each its way up."""

    def __init__(self, base: Product, down: Tensor, ups: Sequence[Up]) -> None:
        self._base, self._down, self._ups = base, Dense(down), ups

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + self._down.nbytes + sum(up.matrix.nbytes for up in self._ups)

    def __call__(self, x: Tensor, bias: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        x = x if prologue is None else prologue(x)
        out, low = self._base(x, bias), self._down(x)  # (T, out), (T, ranks)
        for up in self._ups:
            out[:, up.outputs].addmm_(low[:, up.ranks], up.matrix, alpha=up.scale)
        return out
