"""Norms and gates in the fastest way for where their tensors are: compiled for float32 on the CPU, else torch's."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def is_compiled(x: Tensor) -> bool:
    """Whether models/kernels.py computes with tensors such as `x`."""
    return x.dtype is torch.float32 and x.is_cpu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (T, size) / sqrt(mean(x ** 2) + eps) * weight (size,), arXiv:1910.07467."""
    if not is_compiled(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    from ringlm.models import kernels

    x = x.contiguous()
    out = torch.empty_like(x)
    kernels.rms_norm(x.data_ptr(), weight.data_ptr(), *x.shape, eps, out.data_ptr())
    return out


def silu_multiply(gate_up: Tensor) -> Tensor:
    """silu(gate) * up for gate_up (T, 2 * columns), gates first: (T, columns); arXiv:2002.05202."""
    columns = gate_up.shape[1] // 2
    if not is_compiled(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
    from ringlm.models import kernels

    out = torch.empty(len(gate_up), columns)
    kernels.silu_multiply(gate_up.data_ptr(), len(gate_up), columns, gate_up.stride(0), out.data_ptr())
    return out
