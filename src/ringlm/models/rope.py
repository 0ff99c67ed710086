"""Rotary position embeddings: tables of cosines and sines, and their use. Knows nothing of attention.

RoFormer, arXiv:2104.09864, in transformers' convention: of the dimensions that turn, i turns with i + half of them.
Angles are float32, whatever the model's dtype. Where a scaling depends on how long a sequence gets (dynamic, longrope),
the table is the one for sequences of the whole context: all positions of a sequence have to turn alike, and how long
it will be is not known when its first ones are computed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ringlm.models.kinds import Rope


def frequencies(rope: Rope, head_dim: int, context: int) -> Tensor:
    """Radians per position for sequences of up to `context`, (rotary dimensions / 2,) float32."""
    size = int(head_dim * rope.partial)
    exponents = torch.arange(0, size, 2, dtype=torch.float32) / size
    plain = torch.reciprocal(rope.theta**exponents)
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "dynamic" and context > rope.original_context:
        stretch = rope.factor * context / rope.original_context - (rope.factor - 1)
        return torch.reciprocal((rope.theta * stretch ** (size / (size - 2))) ** exponents)
    if rope.kind == "longrope":
        factors = rope.long_factors if context > rope.original_context else rope.factors
        return plain / torch.tensor(factors, dtype=torch.float32)
    if rope.kind == "factors":
        return plain / torch.tensor(rope.factors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(plain, rope, size)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Llama 3.1's: what turns often within the original context stays, what hardly turns is stretched, and between the
    two it blends (meta-llama/llama-models, apply_scaling)."""
    turns = rope.original_context * plain / (2 * math.pi)
    stay = ((turns - rope.low_turns) / (rope.high_turns - rope.low_turns)).clamp(0.0, 1.0)
    return (1 - stay) * plain / rope.factor + stay * plain


def _yarn(plain: Tensor, rope: Rope, size: int) -> Tensor:
    """YaRN's, arXiv:2309.00071: as Llama 3.1's, but it blends evenly from dimension to dimension."""

    def dimension(turns: float) -> float:
        """The one that turns so often within the original context."""
        return size * math.log(rope.original_context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = dimension(rope.high_turns), dimension(rope.low_turns)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    width = last - first or 0.001
    stretched = ((torch.arange(size // 2, dtype=torch.float32) - first) / width).clamp(0.0, 1.0)
    return plain / rope.factor * stretched + plain * (1 - stretched)


class RopeTable:
    """Cosines and sines of `context` positions, times the rope's magnitude."""

    def __init__(self, rope: Rope, head_dim: int, context: int, dtype: torch.dtype, device: torch.device) -> None:
        angles = torch.arange(context, dtype=torch.float32)[:, None] * frequencies(rope, head_dim, context)
        # On the CPU for every device: the same table on every rank.
        cos, sin = angles.cos() * rope.magnitude, angles.sin() * rope.magnitude
        self.cos = torch.cat((cos, cos), -1).to(device, dtype)  # (context, rotary dimensions)
        self.sin = torch.cat((-sin, sin), -1).to(device, dtype)  # the sign of rotate-half is in the table

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines of `positions` (T,), each (T, 1, rotary dimensions)."""
        return self.cos[positions].unsqueeze(1), self.sin[positions].unsqueeze(1)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Turn `heads` (T, heads, head_dim) in place by the angles that `RopeTable.at` gave."""
    turned = heads[..., : cos.shape[-1]]
    swapped = turned.roll(cos.shape[-1] // 2, -1)
    turned.mul_(cos).addcmul_(swapped, sin)
