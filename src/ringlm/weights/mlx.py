"""Matrices as mlx-lm quantizes them: `weight` in 32-bit words along a row, `scales` and `biases` for each group of it.

weight = scale * code + bias, codes from 0 up, the lowest bits of a word first. Matrices of all experts of a layer lie
in one tensor. https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.folder import FLOATS, FolderWeights
from ringlm.weights.grouped import WORD_BITS, Grouped, check_bits, form_of, from_words
from ringlm.weights.matrix import Matrix, Quantized, expect, settings

if TYPE_CHECKING:
    from torch import Tensor

_MIXTRAL: Final = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}  # mlx-lm's names for its experts' matrices


class _Settings(msgspec.Struct):
    group_size: int = 64
    bits: int = 4
    mode: str = "affine"


def find(raw: FolderWeights, described: Mapping[str, Any]) -> Quantized:
    """The matrices with scales and biases beside them; a layer may have settings of its own, by its name."""
    matrices: dict[str, Matrix] = {}
    used: set[str] = set()
    for name in raw.names():
        layer, dot, kind = name.rpartition(".")
        if kind != "scales":
            continue
        own = described.get(layer)
        said = settings(own if isinstance(own, dict) else described, _Settings)
        if said.mode != "affine":
            raise ModelError(f"config.json: MLX weights in the mode {said.mode!r:.20} are not supported; affine is.")
        check_bits(said.bits, said.group_size)
        words, biases = f"{layer}{dot}weight", f"{layer}{dot}biases"
        *experts, rows, count = _dimensions(raw, name)
        columns = count * said.group_size
        expect(raw, words, ("U32",), (*experts, rows, columns * said.bits // WORD_BITS))
        expect(raw, name, FLOATS, (*experts, rows, count))
        expect(raw, biases, FLOATS, (*experts, rows, count))
        for expert, matrix in _names(layer, *experts):
            form = form_of(columns, said.bits, said.group_size)
            matrices[matrix] = _Mlx(raw, layer + dot, words, (rows, columns), said.bits, said.group_size, form, expert)
        used |= {words, name, biases}
    return Quantized(matrices, used)


def _dimensions(raw: FolderWeights, scales: str) -> tuple[int, ...]:
    shape = raw.shape(scales)
    if len(shape) not in (2, 3) or (len(shape) == 3 and ".switch_mlp." not in scales):
        raise ModelError(f"{raw.place(scales)} has the shape {list(shape)}, which is not that of a matrix.")
    return shape


def _names(layer: str, experts: int | None = None) -> Iterator[tuple[int | None, str]]:
    """(expert, Hugging Face name) of the matrices in a layer's tensors."""
    if experts is None:
        yield None, f"{layer}.weight"
        return
    before, _, kind = layer.partition(".switch_mlp.")
    if before.endswith(".block_sparse_moe"):
        kind = _MIXTRAL.get(kind, kind)
    for expert in range(experts):
        yield expert, f"{before}.experts.{expert}.{kind}.weight"


@dataclass
class _Mlx(Grouped):
    """One matrix of the tensors `prefix`weight, scales and biases, which may hold those of all experts."""

    expert: int | None

    def codes(self, rows: slice, columns: slice) -> Tensor:
        import torch

        held = WORD_BITS // self.bits  # codes in a word
        first = columns.start // held
        words = self._read("weight", rows, slice(first, -(-columns.stop // held)), torch.uint32)
        return from_words(words, self.bits)[:, columns.start - first * held : columns.stop - first * held]

    def figures(self, rows: slice, groups: slice) -> tuple[Tensor, Tensor]:
        import torch

        return self._read("scales", rows, groups, torch.float32), self._read("biases", rows, groups, torch.float32)

    def _read(self, kind: str, rows: slice, columns: slice, dtype: Any) -> Tensor:
        if self.expert is None:
            return self.raw.read(self.prefix + kind, rows, columns, dtype)
        experts = slice(self.expert, self.expert + 1)
        return self.raw.read(self.prefix + kind, experts, rows, dtype)[0][:, columns]
