"""Blocks of GGUF files, as packed matrices and as float32. Knows bytes, not files.

Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0 have blocks of 32 elements: a float16 scale d, for Q4_1 and Q5_1 a float16 minimum,
then the codes. IQ4_NL and MXFP4 have 4 bits an element that choose one of 16 integers; MXFP4's scale is a power of
two, of which a byte holds the exponent. Q4_K, Q5_K and Q6_K have blocks of 256 with float16 factors d and dmin, and
small integers, of which each group of 32 (Q6_K: 16) has a scale d * sc and a minimum -dmin * m. The layouts are
those of ggml-common.h: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor

from ringlm.weights.packed import BLOCK, Packed, unpack

_TILE: Final = 1 << 20  # bytes decoded at a time
_IQ4_NL: Final = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_MXFP4: Final = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice what the format says


def packed(blocks: Tensor, ggml_type: str) -> Packed:
    """uint8 (rows, blocks in the file, bytes of one) in blocks of 32: Q4_0, Q4_1 and Q4_K in 4 bits, the others in 8.

    Exact for types with blocks of 32, but for MXFP4's scales below 2**-24, which become 0. For K types scales and
    minimums are rounded to float16; Q6_K's codes become those of one scale for two groups. A value beyond float16
    becomes infinite.
    """
    rows = len(blocks)
    height = max(1, _TILE * rows // max(1, blocks.numel()))
    tiles = [_packed(blocks[top : top + height], ggml_type) for top in range(0, max(1, rows), height)]
    if len(tiles) == 1:
        return tiles[0]
    codes, scales, minimums = zip(*(tile[1:] for tile in tiles), strict=True)
    return Packed(
        tiles[0].bits, torch.cat(codes), torch.cat(scales), None if minimums[0] is None else torch.cat(minimums)
    )


def dequantize(blocks: Tensor, ggml_type: str) -> Tensor:
    """uint8 (n, bytes of a block) to float32 (n, elements of a block), to the bit what ggml computes."""
    return unpack(_DECODERS[ggml_type](blocks))


def _packed(blocks: Tensor, ggml_type: str) -> Packed:
    exact = _DECODERS[ggml_type](blocks.flatten(0, 1))
    bits, codes, scales, minimums = _merged(exact) if ggml_type == "Q6_K" else exact
    shape = blocks.shape[0], blocks.shape[1] * codes.shape[1]
    codes = codes.reshape(*shape, codes.shape[2])
    return Packed(bits, codes, scales.view(shape).half(), None if minimums is None else minimums.view(shape).half())


def _merged(halves: Packed) -> Packed:
    """Groups of 16 by twos, in a quarter of the larger scale: its codes times 4 are exact and just fit in int8."""
    scales = halves.scales.view(-1, 2)
    larger = scales.gather(1, scales.abs().argmax(1, keepdim=True))  # may be negative, as -128 is in reach and 128 not
    scale = (larger / 4).half().float()
    factors = (scales / scale).masked_fill_(scale == 0, 0.0).unsqueeze(2)
    codes = halves.codes.view(-1, 2, BLOCK // 2) * factors
    shape = halves.codes.shape[0], halves.codes.shape[1] // 2
    return Packed(8, codes.round_().clamp_(-128, 127).to(torch.int8).view(*shape, BLOCK), scale.view(shape), None)


# The decoders: uint8 (n, bytes of a block) to n rows of a Packed whose scales and minimums are float32, and exact.


def _q4_0(blocks: Tensor) -> Packed:
    return Packed(4, blocks[:, None, 2:], _float16(blocks, 0), None)


def _q4_1(blocks: Tensor) -> Packed:
    return Packed(4, blocks[:, None, 4:], _float16(blocks, 0), _float16(blocks, 2))


def _q5_0(blocks: Tensor) -> Packed:
    codes = _with_fifth_bits(blocks[:, 6:], blocks[:, 2:6]) - 16
    return Packed(8, codes.unsqueeze(1), _float16(blocks, 0), None)


def _q5_1(blocks: Tensor) -> Packed:
    codes = _with_fifth_bits(blocks[:, 8:], blocks[:, 4:8])
    return Packed(8, codes.unsqueeze(1), _float16(blocks, 0), _float16(blocks, 2))


def _q8_0(blocks: Tensor) -> Packed:
    return Packed(8, blocks[:, None, 2:].view(torch.int8), _float16(blocks, 0), None)


def _iq4_nl(blocks: Tensor) -> Packed:
    return Packed(8, _chosen(blocks[:, None, 2:], _IQ4_NL), _float16(blocks, 0), None)


def _mxfp4(blocks: Tensor) -> Packed:
    scales = torch.ldexp(torch.ones(len(blocks), 1), blocks[:, :1].int() - 128)
    return Packed(8, _chosen(blocks[:, None, 1:], _MXFP4), scales, None)


def _q4_k(blocks: Tensor) -> Packed:
    low, high = _nibbles(blocks[:, 16:].view(-1, 4, 1, 32))
    codes = torch.cat((low, high), 2).view(-1, 8, 2, 16)  # 64 elements in 32 bytes, the first 32 in their low halves
    return Packed(4, codes[:, :, 0] | codes[:, :, 1] << 4, *_k_scales(blocks))


def _q5_k(blocks: Tensor) -> Packed:
    low, high = _nibbles(blocks[:, 48:].view(-1, 4, 1, 32))
    fifth = blocks[:, None, 16:48] >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1  # bit i of each byte: group i
    codes = torch.cat((low, high), 2).view(-1, 8, 32) | fifth << 4
    return Packed(8, codes.view(torch.int8), *_k_scales(blocks))


def _q6_k(blocks: Tensor) -> Packed:
    """In groups of 16."""
    low, high = _nibbles(blocks[:, :128].view(-1, 2, 1, 64))  # 128 elements in 64 bytes, the first 64 in low halves
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    upper = blocks[:, 128:192].view(-1, 2, 1, 32) >> shifts & 3
    codes = (torch.cat((low, high), 2).view(-1, 8, 32) | upper.view(-1, 8, 32) << 4).view(torch.int8) - 32
    scales = blocks[:, 192:208].view(torch.int8) * _float16(blocks, 208)
    return Packed(8, codes.view(-1, 16, 16), scales, None)


_DECODERS: Final[Mapping[str, Callable[[Tensor], Packed]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def _k_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """float32 scales and minimums (n, 8). The 6 bits of sc and m for groups 0 to 3 are in bytes of their own, those
    for groups 4 to 7 share a byte for their low halves and have the rest above the others' 6 bits."""
    first, second, shared = blocks[:, 4:16].reshape(-1, 3, 4).unbind(1)
    low, high = _nibbles(shared)
    sc = torch.cat((first & 63, low | first >> 2 & 48), 1)
    m = torch.cat((second & 63, high | second >> 2 & 48), 1)
    return _float16(blocks, 0) * sc, _float16(blocks, 2).neg() * m


def _with_fifth_bits(quads: Tensor, bits: Tensor) -> Tensor:
    """uint8 (n, 16), element j in a low and j + 16 in a high half, and (n, 4), a bit an element: int8 (n, 32)."""
    fifth = bits.unsqueeze(2) >> torch.arange(8, dtype=torch.uint8) & 1
    return (torch.cat(_nibbles(quads), 1) | fifth.flatten(1) << 4).view(torch.int8)


def _chosen(quads: Tensor, values: tuple[int, ...]) -> Tensor:
    """int8 (…, 2 * n): those of the 16 `values` that the halves of bytes (…, n) choose, low halves first."""
    return torch.tensor(values, dtype=torch.int8)[torch.cat(_nibbles(quads), -1).int()]


def _nibbles(values: Tensor) -> tuple[Tensor, Tensor]:
    """The low and the high halves of bytes."""
    return values & 15, values >> 4


def _float16(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at byte `offset` of every block: (n, 1) float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()
