"""Blocks of GGUF files to float32. Knows bytes, not files: ggml's `block_q4_0`, `block_q4_1`, `block_q8_0`.

A block is 32 elements of a row: a float16 scale d (Q4_1: and a float16 minimum m), then the quanta; 4-bit
ones hold elements 0 to 15 in the low halves of 16 bytes and 16 to 31 in the high halves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ringlm.weights.packed import Packed

ELEMENTS = 32


def packed(blocks: Tensor, ggml_type: str) -> Packed:
    """uint8 (rows, blocks, bytes of a block) as it is: the same codes, scales and minimums."""
    scales = blocks[..., :2].contiguous().view(torch.float16).squeeze(2)
    if ggml_type == "Q8_0":
        return Packed(8, blocks[..., 2:].view(torch.int8), scales, None)
    if ggml_type == "Q4_0":
        return Packed(4, blocks[..., 2:], scales, None)
    if ggml_type == "Q4_1":
        return Packed(4, blocks[..., 4:], scales, blocks[..., 2:4].contiguous().view(torch.float16).squeeze(2))
    raise ValueError(f"{ggml_type} is not a block format")


def dequantize(blocks: Tensor, ggml_type: str) -> Tensor:
    """uint8 (n, bytes of a block) to float32 (n, 32)."""
    if ggml_type == "Q8_0":
        return blocks[:, 2:].view(torch.int8) * _float16(blocks, 0)
    if ggml_type == "Q4_0":
        return _quarters(blocks[:, 2:]).sub_(8).mul_(_float16(blocks, 0))
    if ggml_type == "Q4_1":
        return torch.addcmul(_float16(blocks, 2), _quarters(blocks[:, 4:]), _float16(blocks, 0))
    raise ValueError(f"{ggml_type} is not a block format")


def _float16(blocks: Tensor, offset: int) -> Tensor:
    """The float16 at byte `offset` of every block: (n, 1) float32."""
    return blocks[:, offset : offset + 2].contiguous().view(torch.float16).float()


def _quarters(packed: Tensor) -> Tensor:
    """uint8 (n, 16) to the 32 values 0 to 15 in it, float32 (n, 32)."""
    values = torch.empty(packed.shape[0], ELEMENTS)
    values[:, :16] = packed & 15
    values[:, 16:] = packed >> 4
    return values
