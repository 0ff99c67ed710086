"""Matrices of whole numbers from 0 up, of 4 or 8 bits, with a scale and a minimum for each group of columns in a row.
Knows no names; how the numbers lie in a file's words is in mlx.py and gptq.py."""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, Final

from ringlm.errors import ModelError
from ringlm.weights.folder import FolderWeights

if TYPE_CHECKING:
    from torch import Tensor

    from ringlm.weights.packed import Packed

WORD_BITS: Final = 32
_MAX_GROUP: Final = 1 << 31  # columns; more is a damaged file


class Grouped(abc.ABC):
    """weight = scale * code + minimum, in groups of `group` columns each; the last may be smaller."""

    def __init__(self, raw: FolderWeights, tensor: str, shape: tuple[int, int], bits: int, group: int) -> None:
        self.raw, self.tensor, self.shape, self.bits, self.group = raw, tensor, shape, bits, group

    @property
    def order(self) -> Tensor | None:
        """int64 (columns,): the group of each column, where they are not in order."""
        return None

    @property
    def symmetric(self) -> bool:
        """Whether every minimum is that of codes around 0, which a `Packed` leaves out."""
        return False

    @abc.abstractmethod
    def codes(self, rows: slice, columns: slice) -> Tensor:
        """uint8 (rows, columns)."""

    @abc.abstractmethod
    def figures(self, rows: slice, groups: slice) -> tuple[Tensor, Tensor]:
        """Scales and minimums, float32 (rows, groups) each."""

    def floats(self, rows: slice, columns: slice) -> Tensor:
        import torch

        if self.order is None:
            groups = slice(columns.start // self.group, -(-columns.stop // self.group))
            places = torch.arange(columns.start, columns.stop) // self.group - groups.start
        else:
            groups, places = slice(0, -(-self.shape[1] // self.group)), self.order[columns]
        scales, minimums = self.figures(rows, groups)
        return torch.addcmul(minimums[:, places], self.codes(rows, columns).float(), scales[:, places])

    def packed(self, rows: slice, blocks: slice) -> Packed | None:
        """The codes as they are; scales, and minimums (of 8-bit codes from -128 up), are rounded to float16."""
        import torch

        from ringlm.weights.packed import BLOCK, Packed

        if self.group % BLOCK or self.shape[1] % BLOCK or self.order is not None:
            return None
        columns = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        groups = slice(columns.start // self.group, -(-columns.stop // self.group))
        places = torch.arange(columns.start, columns.stop, BLOCK) // self.group - groups.start
        scales, minimums = (figures[:, places] for figures in self.figures(rows, groups))
        codes = self.codes(rows, columns).reshape(*scales.shape, BLOCK)
        if self.bits == 4:
            codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
        else:
            codes, minimums = (codes ^ 128).view(torch.int8), minimums + 128 * scales
        return Packed(self.bits, codes, scales.half(), None if self.symmetric else minimums.half())


def from_words(words: Tensor, bits: int) -> Tensor:
    """32-bit words (n, words), the lowest bits first, to the codes in them, uint8 (n, words * 32 / bits)."""
    import torch

    codes = words.reshape(-1).view(torch.uint8).view(len(words), words.shape[1] * 4)
    return codes if bits == 8 else torch.stack((codes & 15, codes >> 4), -1).flatten(1)


def check_bits(bits: int, group: int) -> None:
    """ModelError for codes that are not supported."""
    if bits not in (4, 8) or not 1 <= group <= _MAX_GROUP:
        raise ModelError(
            f"config.json: weights quantized to {bits} bits in groups of {group} are not supported; 4 and 8 bits are."
        )
