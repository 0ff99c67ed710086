"""Products with packed rows on a GPU that triton compiles for: a few activations straight from the codes, and
unpacking in one pass. Blocks lie as in parallel/packed_device.py. Imported only where `DevicePacked` asks for it.

Torch's own int4 product needs codes in an order of its own, from which nothing can be unpacked for prompts, and takes
bfloat16 scales only; for 8 bits with a scale a block it has none (docs/performance.md).
"""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# What one program of a product takes: rows, and blocks of 32 columns at a time, 16 or 32 bytes a thread and block.
_ROWS: Final = 4
_BLOCKS: Final = 32
_UNPACKED: Final = 64  # blocks that a program unpacks


@triton.jit(
    do_not_specialize=["rows", "columns", "lead", "x_stride", "out_stride"],
    do_not_specialize_on_alignment=["x", "out"],
)
def _product(
    x, codes, scales, minimums, out, rows, blocks, columns, lead, x_stride, out_stride,
    FOUR: tl.constexpr, MINIMUM: tl.constexpr, BYTES: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    x += tl.program_id(1) * x_stride
    byte = tl.arange(0, BYTES)
    total = tl.zeros((ROWS, BLOCKS), tl.float32)
    for first in range(0, blocks, BLOCKS):
        block = first + tl.arange(0, BLOCKS)
        inside = (row < rows)[:, None] & (block < blocks)[None, :]
        place = row[:, None].to(tl.int64) * blocks + block[None, :]
        code = tl.load(codes + place[:, :, None] * BYTES + byte[None, None, :], inside[:, :, None], 0)
        column = block[:, None] * 32 + byte[None, :] - lead
        value = tl.load(x + column, (column >= 0) & (column < columns), 0.0).to(tl.float32)
        if FOUR:
            column += 16
            high = tl.load(x + column, (column >= 0) & (column < columns), 0.0).to(tl.float32)
            dot = tl.sum((code & 15).to(tl.float32) * value[None] + (code >> 4).to(tl.float32) * high[None], 2)
            value += high
        else:
            dot = tl.sum(code.to(tl.int8, bitcast=True).to(tl.float32) * value[None], 2)
        scale = tl.load(scales + place, inside, 0.0).to(tl.float32)
        if MINIMUM:
            total += scale * dot + tl.load(minimums + place, inside, 0.0).to(tl.float32) * tl.sum(value, 1)[None]
        elif FOUR:
            total += scale * (dot - 8 * tl.sum(value, 1)[None])
        else:
            total += scale * dot
    tl.store(out + tl.program_id(1) * out_stride + row, tl.sum(total, 1), row < rows)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["scales", "minimums"])
def _unpack(
    codes, scales, minimums, out, count,
    FOUR: tl.constexpr, MINIMUM: tl.constexpr, BYTES: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = (block < count)[:, None]
    scale = tl.load(scales + block, block < count, 0.0).to(tl.float32)[:, None]
    byte = tl.arange(0, BYTES)[None, :]
    code = tl.load(codes + block[:, None] * BYTES + byte, inside, 0)
    place = out + block[:, None] * 32 + byte
    if MINIMUM:
        minimum = tl.load(minimums + block, block < count, 0.0).to(tl.float32)[:, None]
    elif FOUR:
        minimum = -8 * scale
    else:
        minimum = tl.zeros_like(scale)
    if FOUR:
        tl.store(place, (code & 15).to(tl.float32) * scale + minimum, inside)
        tl.store(place + 16, (code >> 4).to(tl.float32) * scale + minimum, inside)
    else:
        tl.store(place, code.to(tl.int8, bitcast=True).to(tl.float32) * scale + minimum, inside)


class Product:
    """The product of one segment of packed rows, whose first block begins `lead` columns before the matrix."""

    def __init__(self, codes: Tensor, scales: Tensor, minimums: Tensor | None, lead: int) -> None:
        self._held = codes, scales, scales if minimums is None else minimums
        self._rows, self._blocks = scales.shape
        self._lead, self._programs = lead, triton.cdiv(self._rows, _ROWS)
        self._form = _form(codes, minimums)

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (T, columns) times the rows, to out (T, rows) of the same dtype; both have rows without gaps."""
        kernel = _compiled_product(x.dtype, self._blocks, self._form)
        sizes = self._rows, self._blocks, x.shape[1], self._lead, x.stride(0), out.stride(0)
        kernel[self._programs, x.shape[0], 1](x, *self._held, out, *sizes, *self._form, _ROWS, _BLOCKS)


def unpack(codes: Tensor, scales: Tensor, minimums: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As parallel/segment.py does, to `dtype`, rounded once; everything is contiguous."""
    rows, blocks = scales.shape
    out = torch.empty(rows, blocks * 32, dtype=dtype, device=codes.device)
    count, form = rows * blocks, _form(codes, minimums)
    if count:
        kernel = _compiled_unpack(dtype, form)
        programs = triton.cdiv(count, _UNPACKED), 1, 1
        kernel[programs](codes, scales, scales if minimums is None else minimums, out, count, *form, _UNPACKED)
    return out


def _form(codes: Tensor, minimums: Tensor | None) -> tuple[bool, bool, int]:
    """Whether codes have 4 bits, whether blocks have minimums, and the bytes of a block's codes."""
    return codes.shape[2] == 16, minimums is not None, codes.shape[2]


# Kernels are launched without triton's look at every argument, which takes longer than a product: what they were
# compiled for is in these arguments, and nothing else is specialized on.


@functools.cache
def _compiled_product(dtype: torch.dtype, blocks: int, form: tuple[bool, bool, int]) -> Any:
    sizes = 1, blocks, 1, 0, 1, 1
    return _product.warmup(
        dtype, torch.uint8, torch.float16, torch.float16, dtype, *sizes, *form, _ROWS, _BLOCKS, grid=(1,)
    )


@functools.cache
def _compiled_unpack(dtype: torch.dtype, form: tuple[bool, bool, int]) -> Any:
    return _unpack.warmup(torch.uint8, torch.float16, torch.float16, dtype, 1, *form, _UNPACKED, grid=(1,))
