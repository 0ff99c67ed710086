"""From model files to one rank's model: every tensor is checked first, then this rank's parts are read, a layer
at a time, its adapter beside it. Knows no family: the family asks a ShardLoader for its layers."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from ringlm.errors import ModelError
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import read_config
from ringlm.models.packing import Layout, Packer, layout_of
from ringlm.models.registry import builder
from ringlm.models.sizes import IGNORED
from ringlm.parallel.adapter import Adapted, Up
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.experts import Expert, Experts
from ringlm.parallel.linear import ColumnParallel, Dense, LinearSpec, Part, Product, RowParallel, Storage
from ringlm.parallel.prologue import Gate, Prologue, RmsNorm
from ringlm.parallel.shard import Range, ShardPlan
from ringlm.weights.adapter import Adapter
from ringlm.weights.files import ModelFiles
from ringlm.weights.source import WeightSource

_TILE: Final = 1 << 20  # elements that are copied at a time into a matrix of several parts


def load_model(
    files: ModelFiles,
    plan: ShardPlan,
    rank: int,
    comm: Communicator,
    *,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    bits: int | None = None,
    led: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Rank `rank`'s part of the model in `files`, ready for sequences of up to `context` positions.

    With `bits` (4 or 8) matrices are packed: those that the files hold packed as they are, the others in that many
    bits, but the embedding and the output head in 8. `progress` hears (bytes held, bytes to hold) as loading goes on.
    With `led`, rank 0 chooses experts for all ranks, whose hardware differs. An adapter stays in floats.
    Raises ModelError, with file and tensor, before any memory is taken for weights.
    """
    config = dataclasses.replace(read_config(files.config), context=context)
    shard = plan.ranks[rank]
    build = builder(config.architecture)
    layout = None if bits is None else layout_of(device)
    survey = ShardLoader(files.tensors, comm, torch.device("meta"), dtype, bits, layout, led, files.adapter)
    total = build(dataclasses.replace(config, context=1), shard, survey).nbytes
    if len(shard.layers) == config.layers:
        survey.refuse_unused()
    load = ShardLoader(files.tensors, comm, device, dtype, bits, layout, led, files.adapter, total, progress)
    with load.kept(survey, (files.fingerprint, files.changed, shard, bits)):
        return build(config, shard, load)


class ShardLoader:
    """Builds layers from a rank's parts of tensors. On the meta device it checks names and shapes, counts
    bytes and reads nothing: the survey that comes before memory is taken."""

    def __init__(
        self,
        source: WeightSource,
        comm: Communicator,
        device: torch.device,
        dtype: torch.dtype,
        bits: int | None = None,
        layout: Layout | None = None,
        led: bool = False,
        adapter: Adapter | None = None,
        total: int = 0,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.comm, self.device, self.dtype, self.led, self.nbytes = comm, device, dtype, led, 0
        self._source, self._adapter, self._total, self._progress = source, adapter, total, progress
        self._bits, self._names, self._used = bits, frozenset(source.names()), set[str]()
        self._packer = None if layout is None else Packer(source, device, dtype, layout)

    @contextlib.contextmanager
    def kept(self, survey: ShardLoader, key: tuple[object, ...]) -> Iterator[None]:
        """While a shard is built that `survey` has been over: packed matrices come from the file that an earlier
        start has kept under `key`, or go into it."""
        if self._packer is None or survey._packer is None:
            yield
            return
        with self._packer.kept(key, survey._packer.expected):
            yield

    def column(self, spec: LinearSpec, prologue: Prologue | None = None) -> ColumnParallel:
        """A column-parallel layer; its parts' biases are cut as their rows are."""
        bias = None
        if spec.bias:
            bias = torch.cat([self.vector(f"{part.name}.bias", part.shape[0], part.rows) for part in spec.parts])
        return ColumnParallel(self._product(spec.parts), bias, prologue)

    def row(self, spec: LinearSpec, prologue: Prologue | None = None, norm: RmsNorm | None = None) -> RowParallel:
        """A row-parallel layer; every rank holds the whole bias, which is added after the reduction."""
        (part,) = spec.parts
        bias = self.vector(f"{part.name}.bias", part.shape[0]) if spec.bias else None
        return RowParallel(self._product(spec.parts), bias, self.comm, prologue, norm)

    def vocabulary(self, name: str, shape: tuple[int, int], rows: Range) -> Storage:
        """`rows` of the embedding or output head `name`.weight of `shape`. It is packed in 8 bits: in 4 it would cost
        more of a model's quality than all other matrices (docs/performance.md)."""
        return self._matrix((Part(name, shape, rows, Range(0, shape[1])),), self._bits and 8)

    def experts(self, specs: Sequence[tuple[LinearSpec, LinearSpec]], gate: Gate) -> Experts:
        """Experts of one shape, each its gates and ups, then down."""
        gate_up, down = (self._matrices([spec.parts for spec in kind], self._bits) for kind in zip(*specs, strict=True))
        experts = [Expert(*matrices) for matrices in zip(gate_up, down, strict=True)]
        return Experts(experts, gate) if self._packer is None else self._packer.experts(experts, gate)

    def has(self, name: str) -> bool:
        """Whether there is such a tensor."""
        return name in self._names

    def whole(self, name: str, shape: tuple[int, int]) -> Dense:
        """The matrix `name`.weight of `shape`, which every rank holds whole and in floats."""
        self._check(f"{name}.weight", shape)
        return Dense(self._read(f"{name}.weight", Range(0, shape[0]), Range(0, shape[1])))

    def vector(self, name: str, size: int, part: Range | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """The vector `name` of `size`, or a part of it, in `dtype` (None: the activations')."""
        self._check(name, (size,))
        return self._read(name, Range(0, size) if part is None else part, dtype=dtype)

    def refuse_unused(self) -> None:
        """ModelError for a tensor that the model has no place for: the result would be silently wrong."""
        for layer, low in ({} if self._adapter is None else self._adapter.layers).items():
            if low.down not in self._used:
                raise ModelError(f"adapters of {layer!r} are not supported. Merge the adapter into the model.")
        for name in self._source.names():
            if name not in self._used and not name.endswith(IGNORED):
                raise ModelError(f"{self._source.place(name)} has no place in this model; config.json does not fit.")

    def _product(self, parts: tuple[Part, ...]) -> Product:
        """The parts of a layer below one another, with what the adapter adds to them."""
        base = self._matrix(parts, self._bits)
        if self._adapter is None:
            return base
        tensors, downs, ups = self._adapter.tensors, list[Tensor](), list[Up]()
        bottom = ranks = 0
        for name, group in itertools.groupby(parts, lambda part: part.name):
            same = list(group)  # rows of one matrix in the file, which has one adapter
            top, bottom = bottom, bottom + sum(len(part.rows) for part in same)
            if (low := self._adapter.layers.get(name)) is not None:
                every = Range(0, low.rank)
                downs.append(self._read(low.down, every, same[0].columns, source=tensors))
                matrix = torch.cat([self._read(low.up, part.rows, every, source=tensors) for part in same])
                across = slice(ranks, ranks + low.rank)
                ups.append(Up(slice(top, bottom), across, matrix.T.contiguous(), low.scale))
                ranks += low.rank
                self._used.add(low.down)
        return Adapted(base, torch.cat(downs), ups) if ups else base

    def _matrix(self, parts: tuple[Part, ...], bits: int | None) -> Storage:
        """The parts of a layer below one another."""
        return self._matrices([parts], bits)[0]

    def _matrices(self, stack: Sequence[tuple[Part, ...]], bits: int | None) -> list[Storage]:
        """Matrices of one shape, each the parts of a layer below one another."""
        for part in itertools.chain(*stack):
            self._check(f"{part.name}.weight", part.shape)
        if self._packer is None or bits is None:
            return [Dense(self._dense(parts)) for parts in stack]
        packed = self._packer.pack(stack, bits)
        self._count(sum(matrix.nbytes for matrix in packed))
        return packed

    def _dense(self, parts: tuple[Part, ...]) -> Tensor:
        if len(parts) == 1:
            return self._read(f"{parts[0].name}.weight", parts[0].rows, parts[0].columns)
        rows = sum(len(part.rows) for part in parts)
        stacked = torch.empty(rows, len(parts[0].columns), dtype=self.dtype, device=self.device)
        height = max(1, _TILE // max(1, len(parts[0].columns)))
        top = 0
        for part in parts:
            for first in range(part.rows.start, part.rows.stop, height):
                tile = Range(first, min(first + height, part.rows.stop))
                stacked[top : top + len(tile)] = self._read(f"{part.name}.weight", tile, part.columns)
                top += len(tile)
        return stacked

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        found = self._source.shape(name)
        if found != shape:
            raise ModelError(
                f"{self._source.place(name)} has the shape {list(found)}; config.json makes it {list(shape)}."
            )
        self._used.add(name)

    def _read(
        self,
        name: str,
        rows: Range,
        columns: Range | None = None,
        dtype: torch.dtype | None = None,
        source: WeightSource | None = None,
    ) -> Tensor:
        cut = (len(rows),) if columns is None else (len(rows), len(columns))
        dtype = dtype or self.dtype
        if self.device.type == "meta" or 0 in cut:
            tensor = torch.empty(cut, dtype=dtype, device=self.device)
        else:
            inner = None if columns is None else columns.slice
            tensor = (source or self._source).read(name, rows.slice, inner, dtype).to(self.device)
        self._count(tensor.nbytes)
        return tensor

    def _count(self, nbytes: int) -> None:
        self.nbytes += nbytes
        if self._progress is not None:
            self._progress(self.nbytes, self._total)
