"""Matrices in blocks of 32 codes with a scale and a minimum each, and how floats become such. Knows no files.

Scales are searched for: of several ranges that a block's codes could span, each refined by least squares, the one with
the smallest squared error is taken.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

BLOCK: Final = 32
_RANGES: Final = (1.0, 0.92, 0.84)  # of a block's range: what codes 0 to 15 span before least squares
_TILE: Final = 1 << 18  # elements at a time: a few megabytes of intermediate results


class Packed(NamedTuple):
    """A matrix (rows, blocks * 32) in blocks of 32 columns of a row: weight = scale * code + minimum."""

    bits: int  # 4 or 8
    codes: Tensor  # 4 bits: uint8 (rows, blocks, 16), element j in the low half of byte j, j + 16 in its high half;
    #                8 bits: int8 (rows, blocks, 32)
    scales: Tensor  # float16 (rows, blocks)
    minimums: Tensor | None  # float16 (rows, blocks); None: -8 * scale for 4 bits, 0 for 8 bits


def unpack(packed: Packed) -> Tensor:
    """The weights, float32 (rows, blocks * 32)."""
    scales = packed.scales.float().unsqueeze(2)
    values = packed.codes.float() if packed.bits == 8 else _halves(packed.codes)
    if packed.minimums is not None:
        return torch.addcmul(packed.minimums.float().unsqueeze(2), values, scales).flatten(1)
    return (values.sub_(8) if packed.bits == 4 else values).mul_(scales).flatten(1)


def quantize(weight: Tensor, bits: int) -> Packed:
    """float (rows, columns) in blocks of 32, the last filled up with zeros: 4 bits with a minimum, 8 without.

    Raises ValueError for weights that are not finite or whose scales exceed float16.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    codes = torch.empty(rows, blocks, *((16,) if bits == 4 else (32,)), dtype=torch.uint8 if bits == 4 else torch.int8)
    scales = torch.empty(rows, blocks, dtype=torch.float16)
    minimums = torch.empty(rows, blocks, dtype=torch.float16) if bits == 4 else None
    height = max(1, _TILE // max(1, columns))
    for top in range(0, rows, height):
        tile = slice(top, min(top + height, rows))
        x = torch.nn.functional.pad(weight[tile].float(), (0, blocks * BLOCK - columns)).view(-1, BLOCK)
        if minimums is None:
            found, scale = _eight_bits(x)
        else:
            found, scale, minimum = _four_bits(x)
            minimums[tile] = minimum.view(-1, blocks)
        codes[tile] = found.view(-1, blocks, codes.shape[2])
        scales[tile] = scale.view(-1, blocks)
    if not all(tensor.isfinite().all() for tensor in (scales, minimums) if tensor is not None):
        raise ValueError("the weights are not finite, or too large for scales in float16")
    return Packed(bits, codes, scales, minimums)


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """(n, 32) to int8 codes and float16 scales (n,)."""
    scale = (x.abs().amax(1) / 127).half()
    inverse = scale.float().reciprocal().nan_to_num_(posinf=0.0)
    return x.mul(inverse.unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale


def _four_bits(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, 32) to codes two a byte (n, 16), float16 scales and minimums (n,)."""
    low, high = x.aminmax(dim=1)
    best_error = torch.full_like(low, torch.inf)
    best_scale, best_minimum = torch.zeros_like(low), torch.zeros_like(low)
    mean = x.mean(1)
    for part in _RANGES:
        scale = (high - low) * (part / 15)
        minimum = low + (high - low) * ((1 - part) / 2)
        codes = _codes(x, scale, minimum)
        center = codes.mean(1)
        spread = codes.square().mean(1) - center.square()
        slope = ((codes * x).mean(1) - center * mean) / spread
        scale = torch.where(spread > 1e-6, slope, scale).half().float()
        minimum = (mean - scale * center).half().float()
        codes = _codes(x, scale, minimum)
        error = torch.addcmul(minimum.unsqueeze(1), codes, scale.unsqueeze(1)).sub_(x).square_().sum(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    quads = _codes(x, best_scale, best_minimum).to(torch.uint8)
    nan = torch.where(x.isfinite().all(1), 0.0, torch.nan)  # no comparison chose anything there
    return quads[:, :16] | quads[:, 16:] << 4, (best_scale + nan).half(), best_minimum.half()


def _codes(x: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest codes 0 to 15, as floats."""
    inverse = scale.reciprocal().nan_to_num_(posinf=0.0)
    return x.sub(minimum.unsqueeze(1)).mul_(inverse.unsqueeze(1)).round_().clamp_(0, 15)


def _halves(codes: Tensor) -> Tensor:
    """Two codes a byte (…, 16) to float32 (…, 32)."""
    return torch.cat((codes & 15, codes >> 4), -1).float()
