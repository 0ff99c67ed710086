"""What packed blocks stand for, in plain torch on any device. Knows no layout of matrices, and no products."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

BLOCK: Final = 32  # columns


def unpack(codes: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """Blocks of BLOCK columns, as parallel/packed.py describes them, to float32 (n, blocks * 32).

    codes uint8 (n, blocks, 16) for 4 bits, (n, blocks, 32) for 8 bits; scales and minimums float16 (n, blocks).
    """
    if codes.shape[2] == 16:
        values = torch.cat((codes & 15, codes >> 4), 2).float()
        if minimums is None:
            values -= 8
    else:
        values = codes.view(torch.int8).float()
    values *= scales.float().unsqueeze(2)
    if minimums is not None:
        values += minimums.float().unsqueeze(2)
    return values.flatten(1)
