"""Rows packed in blocks of 32 codes as any device holds them, and what they stand for in plain torch. Knows no layout,
and no products."""

from __future__ import annotations

import copy
from typing import Final, Protocol, TypeVar

import torch
from torch import Tensor

BLOCK: Final = 32  # columns
_Held = TypeVar("_Held", bound="Held")


class Blocks(Protocol):
    """Rows of a matrix in blocks of 32 columns: weight = scale * code + minimum.

    codes: 4 bits: uint8 (rows, blocks, 16), element j in the low half of byte j and j + 16 in its high half;
    8 bits: int8 (rows, blocks, 32). scales: float16 (rows, blocks). minimums: likewise, or None for -8 * scale with
    4 bits and 0 with 8 bits.
    """

    @property
    def bits(self) -> int: ...
    @property
    def codes(self) -> Tensor: ...
    @property
    def scales(self) -> Tensor: ...
    @property
    def minimums(self) -> Tensor | None: ...


class Held:
    """`rows` consecutive rows of one form; the first dimension of each tensor goes along them, `lanes` rows a step."""

    lanes = 1

    def __init__(self, rows: int, codes: Tensor, scales: Tensor, minimums: Tensor | None) -> None:
        self.rows, self.codes, self.scales, self.minimums = rows, codes, scales, minimums

    def tensors(self) -> dict[str, Tensor]:
        """All that it holds, by name."""
        held = {"codes": self.codes, "scales": self.scales}
        return held if self.minimums is None else held | {"minimums": self.minimums}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def cut(self: _Held, first: int, rows: int) -> _Held:
        """Rows [first, first + rows) as a segment of their own, in the same memory; `first` is a multiple of lanes."""
        part, inside = copy.copy(self), slice(first // self.lanes, -(-(first + rows) // self.lanes))
        part.rows = rows
        for name, tensor in self.tensors().items():
            setattr(part, name, tensor[inside])
        return part


def unpack(codes: Tensor, scales: Tensor, minimums: Tensor | None) -> Tensor:
    """Blocks to float32 (n, blocks * 32); codes uint8 (n, blocks, 16) for 4 bits, (n, blocks, 32) for 8."""
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
