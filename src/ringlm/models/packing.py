"""From a file's tensors to a packed matrix: codes as they are where the file holds codes, else quantized, a tile of
rows at a time, so that no whole matrix is ever there in floats. Knows no layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from ringlm.models.shard_file import ShardFile, ShardWriter, shard_path
from ringlm.parallel.linear import Part, Storage
from ringlm.weights.packed import BLOCK, Packed, quantize
from ringlm.weights.source import Form, WeightSource

_TILE: Final = 1 << 20  # elements that are floats at a time
_SAMPLE: Final = (512, 2048)  # rows and columns of the matrix that products are timed with
_ROWS: Final = 32  # a tile has a multiple of them: heads, and the rows that lie side by side, stay whole


class Layout(NamedTuple):
    """How packed rows lie in memory, and what multiplies them there."""

    name: str  # tells the shard files of one layout from another's
    segment: Callable[..., Any]  # of (rows that have its form, number of rows, device, tensors), to be filled
    matrix: Callable[..., Storage]  # of (segments, columns, lead, dtype)


def layout_of(device: torch.device) -> Layout:
    """The layout for products on `device`."""
    if device.type != "cpu":
        from ringlm.parallel.packed_device import DevicePacked, DeviceSegment

        return Layout("row after row", DeviceSegment, DevicePacked)
    from ringlm.parallel.kernels.choice import unpack_from  # with these comes a compiler
    from ringlm.parallel.packed import PackedMatrix, Segment, Workspace

    def sample(rows: int) -> Storage:
        """A matrix that is unpacked from so many rows of activations on."""
        packed = quantize(torch.ones(_SAMPLE), 4)
        segment = Segment(packed, _SAMPLE[0], device)
        segment.fill(0, packed)
        return PackedMatrix([segment], _SAMPLE[1], 0, torch.float32, Workspace(rows))

    workspace = Workspace(unpack_from(sample, _SAMPLE[1]))
    return Layout("eight rows side by side", Segment, partial(PackedMatrix, workspace=workspace))


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

    def pack(self, parts: Sequence[Part], bits: int) -> Storage:
        """The parts of a layer below one another; what the file holds in floats, in `bits` bits."""
        columns = parts[0].columns
        segments = [self._segment(run, bits) for run in self._runs(parts, bits)]
        return self._layout.matrix(segments, len(columns), columns.start % BLOCK, self._dtype)

    def _segment(self, run: Sequence[Part], bits: int) -> Any:
        """Parts that are packed alike."""
        rows = sum(len(part.rows) for part in run)
        sample = self._read(run[0], 0, 0, bits)
        if self._stored is not None:
            return self._layout.segment(sample, rows, self._device, self._stored.tensors(run[0].name))
        segment = self._layout.segment(sample, rows, self._device)
        if self._device.type != "meta":
            first = 0
            for tile in (tile for part in run for tile in self._tiles(part, bits)):
                segment.fill(first, tile)
                first += len(tile.codes)
        for name, tensor in segment.tensors().items():
            if self._writer is not None:
                self._writer.write(f"{run[0].name}.{name}", tensor)
            elif self._device.type == "meta":
                self.expected[f"{run[0].name}.{name}"] = tensor
        return segment

    def _runs(self, parts: Sequence[Part], bits: int) -> list[list[Part]]:
        """Consecutive parts that are packed alike."""
        runs: list[list[Part]] = []
        last = None
        for part in parts:
            form = self._source.form(f"{part.name}.weight") or Form(bits, minimums=bits == 4)
            if form != last:
                runs.append([])
                last = form
            runs[-1].append(part)
        return runs

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
