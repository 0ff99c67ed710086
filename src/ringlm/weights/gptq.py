"""GPTQ's and AWQ's matrices: `qweight` in 32-bit words, `qzeros` and `scales` for each group of inputs, transposed.

weight = scale * (code - zero). GPTQ's words hold codes of consecutive inputs, AWQ's of eight outputs in an order of
their own; words of zeros hold those of outputs, in the same order. GPTQ's first version stores zeros less 1, and
`g_idx` names the group of each input, which is in no order where activations decided (desc_act).
https://github.com/AutoGPTQ/AutoGPTQ, https://github.com/casper-hansen/AutoAWQ
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.folder import FLOATS, FolderWeights
from ringlm.weights.grouped import WORD_BITS, Grouped, check_bits, form_of, from_words
from ringlm.weights.matrix import Matrix, Quantized, expect, settings

if TYPE_CHECKING:
    from torch import Tensor

_AWQ_PLACES: Final = [0, 4, 1, 5, 2, 6, 3, 7]  # where a word has the codes of outputs 0 to 7, counted from its low end


class _Settings(msgspec.Struct):
    quant_method: str
    bits: int
    group_size: int = 128  # -1: all inputs
    checkpoint_format: str = "gptq"
    sym: bool = False  # all zeros are in the middle
    desc_act: bool = False  # the groups are of inputs in another order
    version: str = "gemm"  # AWQ's


def find(raw: FolderWeights, described: Mapping[str, Any]) -> Quantized:
    """The matrices with qweight, qzeros and scales; biases of nothing but zeros, which GPTQ writes everywhere, are
    there for a model that asks for them, and not missed by one that does not."""
    said = settings(described, _Settings)
    awq = said.quant_method == "awq"
    if (said.version.lower() != "gemm") if awq else (said.checkpoint_format not in ("gptq", "gptq_v2")):
        layout, known = (said.version, "gemm is") if awq else (said.checkpoint_format, "gptq and gptq_v2 are")
        raise ModelError(f"config.json: {said.quant_method} in the layout {layout!r:.20} is not supported; {known}.")
    if awq and said.bits != 4:
        raise ModelError(f"config.json: awq in {said.bits} bits is not supported; 4 bits are.")
    matrices: dict[str, Matrix] = {}
    used: set[str] = set()
    for name in raw.names():
        layer, dot, kind = name.rpartition(".")
        if kind != "qweight":
            continue
        prefix = layer + dot
        packing = WORD_BITS // said.bits if said.bits in (4, 8) else 1
        stored = raw.shape(name)
        if len(stored) != 2:
            raise ModelError(f"{raw.place(name)} has the shape {list(stored)}, which is not that of a matrix.")
        inputs, outputs = (stored[0], stored[1] * packing) if awq else (stored[0] * packing, stored[1])
        group = inputs if said.group_size == -1 else said.group_size
        check_bits(said.bits, group)
        groups = -(-inputs // group)
        expect(raw, name, ("I32",), stored)
        expect(raw, f"{prefix}scales", FLOATS, (groups, outputs))
        expect(raw, f"{prefix}qzeros", ("I32",), (groups, -(-outputs // packing)))
        used |= {name, f"{prefix}scales", f"{prefix}qzeros"}
        shape = outputs, inputs
        form = form_of(inputs, said.bits, group, minimums=awq or not said.sym)
        if awq:
            matrices[f"{prefix}weight"] = _Awq(raw, prefix, name, shape, said.bits, group, form)
            continue
        if said.desc_act and group < inputs:
            form = None
        if f"{prefix}g_idx" in raw.entries:
            expect(raw, f"{prefix}g_idx", ("I32",), (inputs,))
            used.add(f"{prefix}g_idx")
        if _is_zero(raw, f"{prefix}bias", outputs):
            used.add(f"{prefix}bias")
        less_one = said.checkpoint_format == "gptq"
        matrices[f"{prefix}weight"] = _Gptq(raw, prefix, name, shape, said.bits, group, form, less_one)
    return Quantized(matrices, used)


def _is_zero(raw: FolderWeights, name: str, size: int) -> bool:
    """Whether the folder has that vector of `size`, and nothing but zeros in it."""
    entry = raw.entries.get(name)
    if entry is None or entry.shape != (size,):
        return False
    with open(entry.path, "rb") as file:
        return os.pread(file.fileno(), entry.nbytes, entry.offset).count(0) == entry.nbytes


class _ZeroPoints(Grouped):
    """What both have in common: scales and zeros by groups, one below the other."""

    @property
    def packing(self) -> int:
        """Codes in a word."""
        return WORD_BITS // self.bits

    def zeros(self, rows: slice, groups: slice) -> Tensor:
        """uint8 (groups, rows)."""
        return self._outputs("qzeros", groups, rows)

    def figures(self, rows: slice, groups: slice) -> tuple[Tensor, Tensor]:
        import torch

        scales = self.raw.read(f"{self.prefix}scales", groups, rows, torch.float32)
        return scales.t(), (scales * self.zeros(rows, groups)).neg_().t()

    def _outputs(self, kind: str, others: slice, rows: slice) -> Tensor:
        """Of a tensor whose words run along the outputs, uint8 (others, rows)."""
        first = rows.start // self.packing
        words = self.raw.read(f"{self.prefix}{kind}", others, slice(first, -(-rows.stop // self.packing)))
        start = first * self.packing
        return self._in_order(from_words(words, self.bits))[:, rows.start - start : rows.stop - start]

    def _in_order(self, codes: Tensor) -> Tensor:
        return codes


@dataclass
class _Gptq(_ZeroPoints):
    """In 4 or 8 bits; `less_one`: its zeros are stored less 1."""

    less_one: bool

    def codes(self, rows: slice, columns: slice) -> Tensor:
        first = columns.start // self.packing
        words = self.raw.read(self.tensor, slice(first, -(-columns.stop // self.packing)), rows)
        start = first * self.packing
        return from_words(words.t(), self.bits)[:, columns.start - start : columns.stop - start]

    def zeros(self, rows: slice, groups: slice) -> Tensor:
        stored = super().zeros(rows, groups)
        return stored + 1 & (1 << self.bits) - 1 if self.less_one else stored

    @functools.cached_property
    def order(self) -> Tensor | None:
        import torch

        name = f"{self.prefix}g_idx"
        if name not in self.raw.entries:
            return None
        groups = self.raw.read(name, dtype=torch.int64)
        if groups.min() < 0 or groups.max() > (self.shape[1] - 1) // self.group:
            raise ModelError(f"{self.raw.place(name)} names a group that is not there. Download it again.")
        return None if torch.equal(groups, torch.arange(self.shape[1]) // self.group) else groups


class _Awq(_ZeroPoints):
    """In 4 bits."""

    def codes(self, rows: slice, columns: slice) -> Tensor:
        return self._outputs("qweight", columns, rows).t().contiguous()

    def _in_order(self, codes: Tensor) -> Tensor:
        return codes.view(len(codes), codes.shape[1] // 8, 8)[:, :, _AWQ_PLACES].flatten(1)
