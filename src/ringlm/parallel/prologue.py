"""What is done to activations right before a product: a norm, or an MLP's gate. A layer knows its prologue, so that a
packed matrix can do it in the same call. Knows no matrices.

For float32 on the CPU both are compiled (kernels/rows.py): torch takes 17 us for a norm that takes 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """x / sqrt(mean(x ** 2) + eps) * weight, arXiv:1910.07467; weight (size,)."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(T, size) to (T, size)."""
        if not _compiled(x):
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        from ringlm.parallel.kernels.rows import rms_norm

        x = x.contiguous()
        out = torch.empty_like(x)
        rms_norm(x.data_ptr(), self.weight.data_ptr(), *x.shape, self.eps, out.data_ptr())
        return out


@dataclass(frozen=True)
class SiluGate:
    """silu(gate) * up, arXiv:2002.05202."""

    def __call__(self, x: Tensor) -> Tensor:
        """(T, 2 * columns), gates first, to (T, columns)."""
        rows, columns = x.shape[0], x.shape[1] // 2
        if not _compiled(x):
            gate, up = x.chunk(2, -1)
            return F.silu(gate).mul_(up)
        from ringlm.parallel.kernels.rows import silu_multiply

        out = torch.empty(rows, columns)
        silu_multiply(x.data_ptr(), rows, columns, x.stride(0), out.data_ptr())
        return out


Prologue: TypeAlias = RmsNorm | SiluGate


def _compiled(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu
