"""From model files to one rank's model: every tensor is checked first, then this rank's parts are read, a layer
at a time. Knows no family: the family asks a ShardLoader for its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from ringlm.errors import ModelError
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import dimensions, read_config
from ringlm.models.registry import builder
from ringlm.parallel.communicator import Communicator
from ringlm.parallel.linear import ColumnParallel, Dense, LinearSpec, RowParallel, Store
from ringlm.parallel.shard import Range, ShardPlan
from ringlm.weights.files import ModelFiles
from ringlm.weights.source import WeightSource

__all__ = ["ShardLoader", "dimensions", "load_model"]

# Old checkpoints hold rotary frequencies, which are computed; some tied ones repeat the head.
_IGNORED: Final = (".rotary_emb.inv_freq", "lm_head.weight")


def load_model(
    files: ModelFiles,
    plan: ShardPlan,
    rank: int,
    comm: Communicator,
    *,
    device: torch.device,
    dtype: torch.dtype,
    context: int,
    progress: Callable[[int, int], None] | None = None,
) -> CausalLM:
    """Rank `rank`'s part of the model in `files`, ready for sequences of up to `context` positions.

    `progress` hears (bytes held, bytes to hold) as loading goes on. Raises ModelError, with file and tensor,
    before any memory is taken for weights.
    """
    config = dataclasses.replace(read_config(files.config), context=context)
    shard = plan.ranks[rank]
    build = builder(config.architecture)
    survey = ShardLoader(files.tensors, comm, torch.device("meta"), dtype)
    total = build(dataclasses.replace(config, context=1), shard, survey).nbytes
    if len(shard.layers) == config.layers:
        survey.refuse_unused()
    return build(config, shard, ShardLoader(files.tensors, comm, device, dtype, total, progress))


class ShardLoader:
    """Builds layers from a rank's parts of tensors. On the meta device it checks names and shapes, counts
    bytes and reads nothing: the survey that comes before memory is taken."""

    def __init__(
        self,
        source: WeightSource,
        comm: Communicator,
        device: torch.device,
        dtype: torch.dtype,
        total: int = 0,
        progress: Callable[[int, int], None] | None = None,
        store: Store = Dense,
    ) -> None:
        self.comm, self.device, self.dtype, self.nbytes = comm, device, dtype, 0
        self._source, self._total, self._progress, self._store = source, total, progress, store
        self._used: set[str] = set()

    def column(self, spec: LinearSpec) -> ColumnParallel:
        """A column-parallel layer; its parts' biases are cut as their rows are."""
        bias = None
        if spec.bias:
            bias = torch.cat([self.vector(f"{part.name}.bias", part.shape[0], part.rows) for part in spec.parts])
        return ColumnParallel(self._store(self._stacked(spec)), bias)

    def row(self, spec: LinearSpec) -> RowParallel:
        """A row-parallel layer; every rank holds the whole bias, which is added after the reduction."""
        (part,) = spec.parts
        bias = self.vector(f"{part.name}.bias", part.shape[0]) if spec.bias else None
        return RowParallel(self._store(self._stacked(spec)), bias, self.comm)

    def matrix(self, name: str, shape: tuple[int, int], rows: Range) -> Tensor:
        """`rows` of the matrix `name`.weight of `shape`."""
        return self._read(f"{name}.weight", shape, rows, Range(0, shape[1]))

    def vector(self, name: str, size: int, part: Range | None = None) -> Tensor:
        """The vector `name` of `size`, or a part of it."""
        return self._read(name, (size,), Range(0, size) if part is None else part)

    def refuse_unused(self) -> None:
        """ModelError for a tensor that the model has no place for: the result would be silently wrong."""
        for name in self._source.names():
            if name not in self._used and not name.endswith(_IGNORED):
                raise ModelError(f"{self._source.place(name)} has no place in this model; config.json does not fit.")

    def _stacked(self, spec: LinearSpec) -> Tensor:
        """The parts of a layer below one another."""
        if len(spec.parts) == 1:
            (part,) = spec.parts
            return self._read(f"{part.name}.weight", part.shape, part.rows, part.columns)
        rows = sum(len(part.rows) for part in spec.parts)
        stacked = torch.empty(rows, len(spec.parts[0].columns), dtype=self.dtype, device=self.device)
        top = 0
        for part in spec.parts:
            bottom = top + len(part.rows)
            stacked[top:bottom] = self._read(f"{part.name}.weight", part.shape, part.rows, part.columns)
            top = bottom
        return stacked

    def _read(self, name: str, shape: tuple[int, ...], rows: Range, columns: Range | None = None) -> Tensor:
        found = self._source.shape(name)
        if found != shape:
            raise ModelError(
                f"{self._source.place(name)} has the shape {list(found)}; config.json makes it {list(shape)}."
            )
        self._used.add(name)
        cut = (len(rows),) if columns is None else (len(rows), len(columns))
        if self.device.type == "meta" or 0 in cut:
            tensor = torch.empty(cut, dtype=self.dtype, device=self.device)
        else:
            inner = None if columns is None else columns.slice
            tensor = self._source.read(name, rows.slice, inner, self.dtype).to(self.device)
        self.nbytes += tensor.nbytes
        if self._progress is not None:
            self._progress(self.nbytes, self._total)
        return tensor
