"""Matrices in blocks of 32 codes with a scale and a minimum each, and how floats become such. Knows no files.

4-bit scales are searched for: least squares gives the best scale for given codes, rounding the best codes for a given
scale, by turns; of several starts the one that ends with the smallest squared error is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

BLOCK: Final = 32
_STARTS: Final = (1.0, 0.9)  # of a block's range: what its codes span at first
_ROUNDS: Final = 2  # of least squares
_TILE: Final = 1 << 20  # elements at a time: 30 MB of intermediate results


class Packed(NamedTuple):
    """A matrix (rows, blocks * 32) in blocks of 32 columns of a row: weight = scale * code + minimum."""

    bits: int  # 4 or 8
    codes: Tensor  # 4 bits: uint8 (rows, blocks, 16), element j in the low half of byte j, j + 16 in its high half;
    #                8 bits: int8 (rows, blocks, 32)
    scales: Tensor  # float16 (rows, blocks); may be negative
    minimums: Tensor | None  # float16 (rows, blocks); None: -8 * scale for 4 bits, 0 for 8 bits


def unpack(packed: Packed) -> Tensor:
    """The weights, float32 (rows, blocks * 32)."""
    scales = packed.scales.float().unsqueeze(2)
    values = packed.codes.float() if packed.bits == 8 else _halves(packed.codes)
    if packed.minimums is not None:
        return torch.addcmul(packed.minimums.float().unsqueeze(2), values, scales).flatten(1)
    return (values.sub_(8) if packed.bits == 4 else values).mul_(scales).flatten(1)


def quantize(weight: Tensor, bits: int) -> Packed:
    """float (rows, columns) in blocks of 32, the last filled up with zeros: 4 bits with a minimum, 8 bits without.

    Raises ValueError for weights that are not finite or whose scale or minimum exceeds float16.
    """
    fit: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]]
    fit = _eight_bits if bits == 8 else _four_bits
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    codes = torch.empty(rows, blocks, bits * BLOCK // 8, dtype=torch.int8 if bits == 8 else torch.uint8)
    scales = torch.empty(rows, blocks, dtype=torch.float16)
    minimums = torch.empty_like(scales) if bits == 4 else None
    height = max(1, _TILE // max(1, columns))
    for top in range(0, rows, height):
        tile = slice(top, min(top + height, rows))
        x = torch.nn.functional.pad(weight[tile].float(), (0, blocks * BLOCK - columns)).view(-1, BLOCK)
        found, scale, minimum = fit(x)
        codes[tile] = found.view(codes[tile].shape)
        scales[tile] = scale.view(scales[tile].shape)
        if minimums is not None and minimum is not None:
            minimums[tile] = minimum.view(minimums[tile].shape)
    return Packed(bits, codes, scales, minimums)


def _eight_bits(x: Tensor) -> tuple[Tensor, Tensor, None]:
    """(n, 32) to int8 codes and float16 scales (n,)."""
    scale = (x.abs().amax(1) / 127).half()
    _check(scale)
    return x.mul(_inverse(scale.float()).unsqueeze(1)).round_().clamp_(-127, 127).to(torch.int8), scale, None


# Four bits are fitted to x transposed, (32, n): what is a sum over a block is then a sum of rows, twice as fast.


def _four_bits(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(n, 32) to codes two a byte (n, 16), and scales and minimums (n,) that float16 holds."""
    x = blocks.t().contiguous()
    low, high = x.aminmax(dim=0)
    mean = x.mean(0)
    codes, scratch = torch.empty_like(x), torch.empty_like(x)
    best = _Best(x)
    for part in _STARTS:
        scale = (high - low) * (part / 15)
        minimum = low + (high - low) * ((1 - part) / 2)
        for _ in range(_ROUNDS):
            _round(x, scale, minimum, codes)
            center = codes.mean(0)
            spread = torch.mul(codes, codes, out=scratch).mean(0) - center.square()
            slope = (torch.mul(codes, x, out=scratch).mean(0) - center * mean) / spread
            scale = torch.where(spread > 0, slope, scale).half().float()
            minimum = (mean - scale * center).half().float()
        best.offer(scale, minimum, codes)
    return best.codes(codes), best.scale, best.minimum


class _Best:
    """For each column of x (32, n), the scale and minimum of least squared error among those offered."""

    def __init__(self, x: Tensor) -> None:
        self._x = x
        self._error = torch.full(x.shape[1:], torch.inf)
        self.scale, self.minimum = torch.zeros_like(self._error), torch.zeros_like(self._error)

    def offer(self, scale: Tensor, minimum: Tensor, scratch: Tensor) -> None:
        """`scratch` (32, n) is overwritten."""
        found = _round(self._x, scale, minimum, scratch).mul_(scale).add_(minimum)
        error = found.sub_(self._x).square_().sum(0)
        better = error < self._error
        self._error = torch.where(better, error, self._error)
        self.scale = torch.where(better, scale, self.scale)
        self.minimum = torch.where(better, minimum, self.minimum)

    def codes(self, scratch: Tensor) -> Tensor:
        """uint8 (n, 16), two a byte; ValueError where no offer was a finite one."""
        _check(self._error)
        quads = _round(self._x, self.scale, self.minimum, scratch).to(torch.uint8)
        return (quads[:16] | quads[16:] << 4).t()


def _round(x: Tensor, scale: Tensor, minimum: Tensor, out: Tensor) -> Tensor:
    """The nearest codes 0 to 15, as floats, in `out`."""
    return torch.sub(x, minimum, out=out).mul_(_inverse(scale)).round_().clamp_(0, 15)


def _inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return scale.reciprocal().nan_to_num_(posinf=0.0, neginf=0.0)


def _check(figures: Tensor) -> None:
    if not figures.isfinite().all():
        raise ValueError("the weights are not finite, or too large for scales in float16")


def _halves(codes: Tensor) -> Tensor:
    """Two codes a byte (…, 16) to float32 (…, 32)."""
    return torch.cat((codes & 15, codes >> 4), -1).float()
