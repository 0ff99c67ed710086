"""Matrices of whole numbers from 0 up, of 4 or 8 bits, with a scale and a minimum for each group of columns in a row.
Knows no names; how the numbers lie in a file's words is in mlx.py and gptq.py."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ringlm.errors import ModelError
from ringlm.weights.folder import FolderWeights
from ringlm.weights.source import Form

if TYPE_CHECKING:
    from torch import Tensor

    from ringlm.weights.packed import Packed

WORD_BITS: Final = 32
_MAX_GROUP: Final = 1 << 31  # columns; more is a damaged file


@dataclass
class Grouped(abc.ABC):
    """weight = scale * code + minimum, in groups of `group` columns each; the last may be smaller. `prefix` is what the
    names of its tensors begin with, `tensor` the one with the codes."""

    raw: FolderWeights
    prefix: str
    tensor: str
    shape: tuple[int, int]
    bits: int
    group: int
    form: Form | None

    @property
    def order(self) -> Tensor | None:
        """int64 (columns,): the group of each column, where they are not in order."""
        return None

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

        if self.form is None:
            return None
        if self.order is not None:
            raise self._contradicts("has groups of inputs in another order, which config.json (desc_act) denies")
        columns = slice(blocks.start * BLOCK, blocks.stop * BLOCK)
        groups = slice(columns.start // self.group, -(-columns.stop // self.group))
        places = torch.arange(columns.start, columns.stop, BLOCK) // self.group - groups.start
        scales, minimums = (figures[:, places] for figures in self.figures(rows, groups))
        codes = self.codes(rows, columns).reshape(*scales.shape, BLOCK)
        if self.bits == 4:
            codes = codes[..., : BLOCK // 2] | codes[..., BLOCK // 2 :] << 4
        else:
            codes, minimums = (codes ^ 128).view(torch.int8), minimums + 128 * scales
        if self.form.minimums:
            return Packed(self.bits, codes, scales.half(), minimums.half())
        if not torch.equal(minimums, (-8 if self.bits == 4 else 0) * scales):
            raise self._contradicts("has zeros that are not in the middle, which config.json (sym) denies")
        return Packed(self.bits, codes, scales.half(), None)

    def _contradicts(self, what: str) -> ModelError:
        return ModelError(f"{self.raw.place(self.tensor)} {what}. Use --quant none.")


def form_of(columns: int, bits: int, group: int, minimums: bool = True) -> Form | None:
    """The form of rows of so many columns in groups that are in order; None where they do not fit blocks of 32."""
    return None if group % 32 or columns % 32 else Form(bits, minimums)


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
