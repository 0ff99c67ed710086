"""Rotary position embeddings: tables of cosines and sines, and their use. Knows nothing of attention.

RoFormer, arXiv:2104.09864, in transformers' convention: dimension i of a head turns with i + head_dim / 2.
Angles are float32, whatever the model's dtype.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringlm.models.config import Rope


def frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position, (head_dim / 2,) float32."""
    plain = 1.0 / rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "factors":
        return plain / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1's: wavelengths that the original context held often stay, long ones stretch, and between the
    two it blends (meta-llama/llama-models, apply_scaling)."""
    turns = rope.original_context * plain / (2 * math.pi)  # within the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = blend.clamp(0.0, 1.0)
    return (1 - blend) * plain / rope.factor + blend * plain


class RopeTable:
    """Cosines and sines of `context` positions."""

    def __init__(self, rope: Rope, head_dim: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies(rope, head_dim)
        cos, sin = angles.cos(), angles.sin()  # on the CPU for every device: the same table on every rank
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)  # (context, head_dim)
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)  # the sign of rotate-half is in the table

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of `positions` (T,), each (T, 1, head_dim)."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `heads` (T, heads, head_dim) in place by the angles that `RopeTable.at` gave."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(swapped, sin)
