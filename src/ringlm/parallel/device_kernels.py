"""Products with packed rows on a GPU that triton compiles for: a few activations straight from the codes, and
unpacking in one pass. Blocks lie as in parallel/packed_device.py. Imported only where `DevicePacked` asks for it.

Torch's own int4 product needs codes in an order of its own, from which nothing can be unpacked for prompts, and takes
bfloat16 scales only; for 8 bits with a scale a block it has none (docs/performance.md).
"""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# What one program of a product takes: rows, and blocks of 32 columns at a time, 16 or 32 bytes a thread and block.
_ROWS: Final = 4
_BLOCKS: Final = 32
_UNPACKED: Final = 64  # blocks that a program unpacks


# Without specialization a kernel that was compiled for one call serves all of a segment's.
@triton.jit(
    do_not_specialize=["rows", "columns", "lead", "x_stride", "out_stride"],
    do_not_specialize_on_alignment=["x", "out"],
)
def _product(
    x, codes, scales, minimums, out, rows, blocks, columns, lead, x_stride, out_stride,
    FOUR: tl.constexpr, MINIMUM: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
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


@triton.jit(do_not_specialize=["count"])
def _unpack(
    codes, scales, minimums, out, count,
    FOUR: tl.constexpr, MINIMUM: tl.constexpr, BLOCKS: tl.constexpr, BYTES: tl.constexpr,
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
        self._sizes = *scales.shape, lead
        self._form = codes.shape[2] == 16, minimums is not None, _ROWS, _BLOCKS, codes.shape[2]
        self._compiled: dict[torch.dtype, Any] = {}

    def __call__(self, x: Tensor, out: Tensor) -> None:
        """x (T, columns) times the rows, to out (T, rows) of the same dtype; both have rows without gaps."""
        rows, blocks, lead = self._sizes
        grid = triton.cdiv(rows, _ROWS), x.shape[0], 1
        arguments = (
            x, *self._held, out, rows, blocks, x.shape[1], lead, x.stride(0), out.stride(0), *self._form
        )  # fmt: skip
        compiled = self._compiled.get(x.dtype)
        if compiled is None:
            self._compiled[x.dtype] = _product[grid](*arguments)
        else:  # launched without triton's look at every argument, which takes longer than the product
            compiled[grid](*arguments)


def unpack(codes: Tensor, scales: Tensor, minimums: Tensor | None, dtype: torch.dtype) -> Tensor:
    """As parallel/unpacking.py does, to `dtype`, rounded once; everything is contiguous."""
    rows, blocks = scales.shape
    out = torch.empty(rows, blocks * 32, dtype=dtype, device=codes.device)
    held = codes, scales, scales if minimums is None else minimums
    form = codes.shape[2] == 16, minimums is not None, _UNPACKED, codes.shape[2]
    if rows:
        _unpack[(triton.cdiv(rows * blocks, _UNPACKED),)](*held, out, rows * blocks, *form)
    return out
