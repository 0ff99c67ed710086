"""What is done to activations right before a product: a norm, or an MLP's gate. A layer knows its prologue, so that a
packed matrix can do it in the same call. Knows no matrices.

For float32 on the CPU all are compiled (kernels/rows.py): torch takes 17 us for a norm that takes 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """x / sqrt(mean(x ** 2) + eps) * weight, arXiv:1910.07467; weight (size,), of x's dtype or float32."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(T, size) to (T, size)."""
        if not _compiled(x):
            return F.rms_norm(x.to(self.weight.dtype), self.weight.shape, self.weight, self.eps).to(x.dtype)
        from ringlm.parallel.kernels.rows import rms_norm

        x = x.contiguous()
        out = torch.empty_like(x)
        rms_norm(x.data_ptr(), self.weight.data_ptr(), *x.shape, self.eps, out.data_ptr())
        return out

    def in_place(self, x: Tensor) -> None:
        """x (T, heads, size), each head for itself."""
        if not (_compiled(x) and x.is_contiguous()):
            x.copy_(self(x.reshape(-1, x.shape[-1])).view(x.shape))
            return
        from ringlm.parallel.kernels.rows import rms_norm

        here, (tokens, heads, size) = x.data_ptr(), x.shape
        rms_norm(here, self.weight.data_ptr(), tokens * heads, size, self.eps, here)


@dataclass(frozen=True)
class Gate:
    """silu(gate) * up, or gelu(gate) * up with the tanh that approximates GELU, arXiv:2002.05202."""

    gelu: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """(T, 2 * columns), gates first, to (T, columns)."""
        rows, columns = x.shape[0], x.shape[1] // 2
        if not _compiled(x):
            gate, up = x.chunk(2, -1)
            return (F.gelu(gate, approximate="tanh") if self.gelu else F.silu(gate)).mul_(up)
        from ringlm.parallel.kernels.rows import gate_multiply

        out = torch.empty(rows, columns)
        gate_multiply(x.data_ptr(), rows, columns, x.stride(0), self.gelu, out.data_ptr())
        return out


Prologue: TypeAlias = RmsNorm | Gate


def _compiled(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu
