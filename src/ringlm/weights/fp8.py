"""Matrices of 8-bit floats (E4M3) with float scales: one a matrix, one a row, or one a block of rows and columns, as
DeepSeek's and Qwen's have. The scale of activations, where there is one, is not used: they are not quantized here.

https://huggingface.co/docs/transformers/quantization/finegrained_fp8
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec

from ringlm.errors import ModelError
from ringlm.weights.folder import FLOATS, FolderWeights
from ringlm.weights.matrix import Matrix, Quantized, settings
from ringlm.weights.source import Form

if TYPE_CHECKING:
    from torch import Tensor

_SCALES: Final = ("weight_scale_inv", "weight_scale")  # both are what is multiplied with
_UNUSED: Final = ("input_scale", "input_scale_ub", "k_scale", "v_scale")  # of activations and of a cache
_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 31)]
_Block = tuple[_Size, _Size]


class _Weights(msgspec.Struct):
    block_structure: _Block | None = None


class _Group(msgspec.Struct):
    weights: _Weights | None = None


class _Settings(msgspec.Struct):
    weight_block_size: _Block | None = None
    config_groups: dict[str, _Group] = {}  # compressed-tensors' way to say so


def find(raw: FolderWeights, described: Mapping[str, Any]) -> Quantized:
    """The matrices with F8_E4M3 in them."""
    said = settings(described, _Settings)
    blocks = [group.weights.block_structure for group in said.config_groups.values() if group.weights is not None]
    block = said.weight_block_size or next((block for block in blocks if block is not None), None)
    matrices: dict[str, Matrix] = {}
    used = {name for name in raw.names() if name.rpartition(".")[2] in _UNUSED}
    for name, entry in raw.entries.items():
        if entry.dtype != "F8_E4M3":
            continue
        base = name.removesuffix("weight")
        scale = next((base + kind for kind in _SCALES if base + kind in raw.entries), None)
        if scale is None or base == name or len(entry.shape) != 2:
            raise ModelError(f"{raw.place(name)} is of type {entry.dtype}, and has no {_SCALES[1]} beside it.")
        shape = entry.shape[0], entry.shape[1]
        matrices[name] = _Fp8(raw, name, shape, scale, _block_of(raw, scale, shape, block))
        used |= {name, scale}
    return Quantized(matrices, used)


def _block_of(raw: FolderWeights, scale: str, shape: tuple[int, int], block: _Block | None) -> _Block:
    """How many rows and columns share one of the scales."""
    found = raw.shape(scale)
    if raw.entries[scale].dtype in FLOATS:
        if found in ((), (1,), (1, 1)):
            return shape
        if found in ((shape[0],), (shape[0], 1)):
            return 1, shape[1]
        if block is not None and found == (-(-shape[0] // block[0]), -(-shape[1] // block[1])):
            return block
    dtype = raw.entries[scale].dtype
    blocks = "" if block is None else f" or one for every {block[0]} by {block[1]} weights"
    raise ModelError(
        f"{raw.place(scale)} is {dtype} {list(found)}; the matrix {list(shape)} needs one scale, one a row{blocks}."
    )


@dataclass
class _Fp8:
    """The `Matrix` of 8-bit floats `tensor` times `scale`, of which each serves a block of rows and columns."""

    raw: FolderWeights
    tensor: str
    shape: tuple[int, int]
    scale: str
    block: _Block
    form: Form | None = None

    def floats(self, rows: slice, columns: slice) -> Tensor:
        import torch

        high, wide = self.block
        scales = self.raw.read(self.scale, dtype=torch.float32).view(-1, -(-self.shape[1] // wide))
        scales = scales[torch.arange(rows.start, rows.stop) // high]
        places = torch.arange(columns.start, columns.stop) // wide
        return self.raw.read(self.tensor, rows, columns, torch.float32).mul_(scales[:, places])

    def packed(self, rows: slice, blocks: slice) -> None:
        """Floats are not packed as they are."""
