"""From a file's tensors to a packed matrix: codes as they are where the file holds codes, else quantized, a tile of
rows at a time, so that no whole matrix is ever there in floats. Knows no layers."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ringlm.models.shard_file import ShardFile, ShardWriter, shard_path
from ringlm.parallel.experts import Expert, Experts
from ringlm.parallel.linear import Part, Storage
from ringlm.parallel.prologue import Gate
from ringlm.weights.packed import BLOCK, Packed, quantize
from ringlm.weights.source import Form, WeightSource

_TILE: Final = 1 << 20  # elements that are floats at a time
_SAMPLE: Final = (512, 2048)  # rows and columns of the matrix that products are timed with
_ROWS: Final = 32  # a tile has a multiple of them: heads, and the rows that lie side by side, stay whole
_STACKED: Final = 16  # rows: a matrix of a stack begins at a multiple, with rows side by side and an aligned address


class Layout(NamedTuple):
    """How packed rows lie in memory, and what multiplies them there."""

    name: str  # tells the shard files of one layout from another's
    segment: Callable[..., Any]  # of (rows that have its form, number of rows, device, tensors), to be filled
    matrix: Callable[..., Storage]  # of (segments, columns, lead, dtype)
    experts: Callable[[Sequence[Expert], Gate], Experts]


def layout_of(device: torch.device) -> Layout:
    """The layout for products on `device`."""
    if device.type != "cpu":
        from ringlm.parallel.packed_device import DevicePacked, DeviceSegment

        return Layout("row after row", DeviceSegment, DevicePacked, Experts)
    from ringlm.parallel.kernels.choice import unpack_from  # with these comes a compiler
    from ringlm.parallel.kernels.instructions import ROWS
    from ringlm.parallel.packed import Memory, PackedMatrix, Segment, Workspace
    from ringlm.parallel.packed_experts import PackedExperts

    def sample(rows: int) -> Storage:
        """A matrix that is unpacked from so many rows of activations on."""
        packed = quantize(torch.ones(_SAMPLE), 4)
        segment = Segment(packed, _SAMPLE[0], device)
        segment.fill(0, packed)
        return PackedMatrix([segment], _SAMPLE[1], 0, torch.float32, Workspace(rows))

    workspace = Workspace(unpack_from(sample, _SAMPLE[1]))
    matrix = partial(PackedMatrix, workspace=workspace)
    segment = partial(Segment, memory=Memory())
    return Layout(f"{ROWS} rows side by side", segment, matrix, partial(PackedExperts, workspace=workspace))


class Packer:
    """Packs this rank's parts of matrices from `source`.

    On the meta device it reads nothing, and `expected` grows by what a shard file would hold.
    """

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype, layout: Layout) -> None:
        self.expected: dict[str, Tensor] = {}
        self._source, self._device, self._dtype, self._layout = source, device, dtype, layout
        self._stored: ShardFile | None = None
        self._writer: ShardWriter | None = None

    @contextlib.contextmanager
    def kept(self, key: tuple[object, ...], expected: dict[str, Tensor]) -> Iterator[None]:
        """What is packed meanwhile comes from the shard file of `key`, if there is one with the `expected` tensors, or
        is kept there for the next start."""
        path = shard_path(self._layout.name, *key)
        self._stored = ShardFile.find(path, expected)
        if self._stored is not None:
            yield
            return
        self._writer = ShardWriter(path, expected)
        try:
            yield
            self._writer.finish()
        finally:
            self._writer.discard()
            self._writer = None

    def pack(self, stack: Sequence[Sequence[Part]], bits: int) -> list[Storage]:
        """Matrices of one shape, each the parts of a layer below one another; what the file holds in floats, in `bits`
        bits. They lie in common tensors: thousands of experts would be too many for a file to find quickly."""
        columns = stack[0][0].columns
        runs = self._runs(stack[0], bits)
        segments = zip(*(self._segments([parts[run] for parts in stack], bits) for run in runs), strict=True)
        return [self._layout.matrix(own, len(columns), columns.start % BLOCK, self._dtype) for own in segments]

    def experts(self, experts: Sequence[Expert], gate: Gate) -> Experts:
        """Those whose matrices are packed."""
        return self._layout.experts(experts, gate)

    def _segments(self, stack: Sequence[Sequence[Part]], bits: int) -> list[Any]:
        """For each matrix the segment of these parts of it, which are packed alike."""
        name = stack[0][0].name
        rows = sum(len(part.rows) for part in stack[0])
        step = -(-rows // _STACKED) * _STACKED
        whole = (len(stack) - 1) * step + rows
        sample = self._read(stack[0][0], 0, 0, bits)
        stored = None if self._stored is None else self._stored.tensors(name)
        segment = self._layout.segment(sample, whole, self._device, stored)
        if stored is None and self._device.type != "meta":
            for index, parts in enumerate(stack):
                first = index * step
                for tile in (tile for part in parts for tile in self._tiles(part, bits)):
                    segment.fill(first, tile)
                    first += len(tile.codes)
        for kind, tensor in segment.tensors().items():
            if self._writer is not None:
                self._writer.write(f"{name}.{kind}", tensor)
            elif self._device.type == "meta":
                self.expected[f"{name}.{kind}"] = tensor
        return [segment.cut(index * step, rows) for index in range(len(stack))]

    def _runs(self, parts: Sequence[Part], bits: int) -> list[slice]:
        """Consecutive parts that are packed alike."""
        forms = [self._source.form(f"{part.name}.weight") or Form(bits, minimums=bits == 4) for part in parts]
        starts = [index for index in range(len(parts)) if not index or forms[index] != forms[index - 1]]
        return [slice(start, stop) for start, stop in itertools.pairwise([*starts, len(parts)])]

    def _tiles(self, part: Part, bits: int) -> Iterator[Packed]:
        height = max(1, _TILE // max(1, len(part.columns)) // _ROWS) * _ROWS
        for top in range(part.rows.start, part.rows.stop, height):
            yield self._read(part, top, min(top + height, part.rows.stop), bits)

    def _read(self, part: Part, start: int, stop: int, bits: int) -> Packed:
        """Rows [start, stop) of the file's matrix, and this part's columns in whole blocks of the file's."""
        rows = slice(start, stop)
        name = f"{part.name}.weight"
        blocks = slice(part.columns.start // BLOCK, -(-part.columns.stop // BLOCK))
        packed = self._source.packed(name, rows, blocks)
        if packed is not None:
            return packed
        columns = slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, part.shape[1]))
        if start == stop:
            return quantize(torch.empty(0, columns.stop - columns.start), bits)
        return quantize(self._source.read(name, rows, columns, torch.float32), bits)
