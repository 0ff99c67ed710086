"""What is done to activations right before a product: a norm, or an MLP's gate. A layer knows its prologue, so that a
packed matrix can do it in the same call. And the norms at other places: of a sum, of heads. Knows no matrices.

On the CPU all are compiled for float32 (kernels/rows.py), where torch takes 17 us for a norm that takes 1; half types
are widened for a norm, which is then three times faster than torch's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RmsNorm:
    """x / sqrt(mean(x ** 2) + eps) * weight, arXiv:1910.07467; weight (size,), of the model's dtype or float32."""

    weight: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """(T, size) to (T, size)."""
        if not x.is_cpu:
            return F.rms_norm(x.float(), self.weight.shape, self._wide_weight, self.eps).to(x.dtype)
        from ringlm.parallel.kernels.rows import rms_norm

        wide = x.float().contiguous()
        out = torch.empty_like(wide)
        rms_norm(wide.data_ptr(), self._wide_weight.data_ptr(), *x.shape, self.eps, out.data_ptr())
        return out.to(x.dtype)

    @cached_property
    def _wide_weight(self) -> Tensor:
        return self.weight.float()

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual (T, size) += the norm of x (T, size)."""
        if not (_compiled(x) and residual.is_contiguous()):
            residual.add_(self(x))
            return
        from ringlm.parallel.kernels.rows import add_rms_norm

        x = x.contiguous()
        add_rms_norm(x.data_ptr(), self._wide_weight.data_ptr(), *x.shape, self.eps, residual.data_ptr())


def norm_heads(queries: RmsNorm, query_heads: int, keys: RmsNorm, kv_heads: int, qkv: Tensor) -> None:
    """Norms the queries and keys of qkv (T, query + 2 * key-value heads, head_dim) in place, each head for itself."""
    if not _compiled(qkv):
        for norm, heads in ((queries, qkv[:, :query_heads]), (keys, qkv[:, query_heads : query_heads + kv_heads])):
            heads.copy_(norm(heads.reshape(-1, heads.shape[2])).view(heads.shape))
        return
    from ringlm.parallel.kernels import rows

    rows.norm_heads(
        qkv.data_ptr(), qkv.stride(0), qkv.shape[0], queries.weight.data_ptr(), query_heads, keys.weight.data_ptr(),
        kv_heads, qkv.shape[2], queries.eps,
    )  # fmt: skip


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
