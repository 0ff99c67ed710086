"""Matrices packed in blocks of 32 codes, and their products on the CPU. Knows the shard's rows and columns, no files.

Kernels are compiled by numba for this machine (parallel/kernels): torch's own packed products take a third of the
memory bandwidth without AVX-512 and have none for float32 (docs/performance.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.parallel.kernels.choice import NEVER
from ringlm.parallel.kernels.instructions import ROWS
from ringlm.parallel.kernels.products import (
    FORMS,
    GELU_GATE,
    NORM,
    PLAIN,
    SILU_GATE,
    linear,
    linear_by_threads,
    work_bytes,
)
from ringlm.parallel.kernels.rows import BLOCK
from ringlm.parallel.kernels.unpacking import unpack, unpack_by_threads, unpack_rows
from ringlm.parallel.prologue import Gate, Prologue, RmsNorm
from ringlm.parallel.segment import Blocks, Held

_TILE: Final = 1 << 19  # elements unpacked at a time: a megabyte stays in the cache
_CHUNK: Final = 1 << 25  # bytes of memory taken at a time
_LINE: Final = 64  # bytes


class Workspace:
    """Memory for what a product computes on its way; shared by all matrices, since one product is made at a time.

    `unpack_from` is the number of activations from which on matrices are unpacked for a product."""

    def __init__(self, unpack_from: int = NEVER) -> None:
        self.unpack_from = unpack_from
        self._memory = torch.empty(0, dtype=torch.uint8)

    def address(self, nbytes: int) -> int:
        """Of that many bytes."""
        if nbytes > self._memory.nbytes:
            self._memory = torch.empty(nbytes, dtype=torch.uint8)
        return self._memory.data_ptr()

    def matrix(self, rows: int, columns: int) -> Tensor:
        """bfloat16 (rows, columns), with anything in it."""
        nbytes = rows * columns * 2
        self.address(nbytes)
        return self._memory[:nbytes].view(torch.bfloat16).view(rows, columns)


class Memory:
    """Where packed matrices lie, one behind the other: numpy asks the system for huge pages for what is this large,
    and reading those is up to a quarter faster. Each tensor begins at a line of the cache."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A tensor for good; on another device than the CPU, an ordinary one."""
        if device.type != "cpu":
            return torch.zeros(shape, dtype=dtype, device=device)
        nbytes = math.prod(shape) * dtype.itemsize
        start = -self._rest.data_ptr() % _LINE
        if start + nbytes > len(self._rest):
            self._rest = torch.from_numpy(np.zeros(max(nbytes + _LINE, _CHUNK), np.uint8))
            start = -self._rest.data_ptr() % _LINE
        taken, self._rest = self._rest[start : start + nbytes], self._rest[start + nbytes :]
        return taken.view(dtype).view(shape)


class Segment(Held):
    """Rows that lie ROWS side by side in `memory`: a copy of `tensors`, as an earlier segment's `tensors()` were, or
    zeros, to be filled in any order. `like` has the form, and a row's blocks."""

    lanes = ROWS

    def __init__(
        self,
        like: Blocks,
        rows: int,
        device: torch.device,
        tensors: Mapping[str, Tensor] | None = None,
        memory: Memory | None = None,
    ) -> None:
        memory = memory or Memory()
        shape = -(-rows // ROWS), like.scales.shape[1]
        # A block of a row has as many words of 4 bytes as a code has bits.
        codes = memory.zeros((*shape, like.bits, ROWS, 4), torch.uint8, device)
        scales = memory.zeros((*shape, ROWS), torch.float16, device)
        minimums = None if like.minimums is None else memory.zeros((*shape, ROWS), torch.float16, device)
        super().__init__(rows, codes, scales, minimums)
        self.form = FORMS.index((like.bits, like.minimums is not None))
        if tensors is not None:
            for name, tensor in self.tensors().items():
                tensor.copy_(tensors[name])

    @property
    def row_blocks(self) -> int:
        return len(self.codes)

    def fill(self, first: int, part: Blocks) -> None:
        """Take `part` as the rows from `first` on; the form is this segment's."""
        rows = len(part.codes)
        _place(self.codes, first, part.codes.view(torch.uint8).view(rows, part.codes.shape[1], part.bits, 4), rows)
        _place(self.scales, first, part.scales, rows)
        if self.minimums is not None:
            assert part.minimums is not None
            _place(self.minimums, first, part.minimums, rows)

    def unpack_into(self, tile: Tensor, first: int, last: int, threads: int) -> None:
        """Blocks `first` to `last` of ROWS rows to bfloat16 (at least as many rows, columns)."""
        held = (0 if t is None else t.data_ptr() for t in (self.codes, self.scales, self.minimums))
        here = (self.form, *held, tile.data_ptr(), first, last, self.codes.shape[1])
        if threads == 1:
            unpack(*here)
        else:
            unpack_by_threads(threads, *here)

    def rows_into(self, out: Tensor, indices: Tensor, first: int) -> None:
        """Rows of a matrix, of which this segment has those from `first` on, to float32 (n, blocks * 32): of int64
        `indices` (n,) those that are here."""
        held = (0 if t is None else t.data_ptr() for t in (self.codes, self.scales, self.minimums))
        bits, blocks = self.codes.shape[2], self.codes.shape[1]
        unpack_rows(bits, *held, indices.data_ptr(), len(indices), first, self.rows, blocks, out.data_ptr())


class Plan:
    """The words that kernels/products.py reads, and what keeps their addresses alive."""

    def __init__(self, words: list[int], memory: Tensor, weight: Tensor | None, eps: float) -> None:
        self.words, self.eps = words, eps
        self.address = memory.data_ptr()
        self._held = memory, weight


class PackedMatrix:
    """The `Storage` of a matrix (out, in) in packed rows, on the CPU.

    `lead` of the first block's columns lie before the matrix, and some of the last one's behind it, where a shard's
    cut goes through a block: they meet zeros. The result for a single token is overwritten by the next one.
    """

    def __init__(
        self, segments: Sequence[Segment], columns: int, lead: int, dtype: torch.dtype, workspace: Workspace
    ) -> None:
        self._segments = [segment for segment in segments if segment.rows]
        self._columns, self._lead, self._dtype, self._workspace = columns, lead, dtype, workspace
        self._blocks = -(-(lead + columns) // BLOCK)
        self._rows = sum(segment.rows for segment in self._segments)
        # A segment's last lanes may write beyond it: the next one overwrites that, the last has room for it.
        self._stride = self._rows + ROWS - 1
        self._threads = torch.get_num_threads()
        self._unpack_from = workspace.unpack_from
        self._plans: dict[Prologue | None, Plan] = {}

    @functools.cached_property
    def _memory(self) -> Tensor:
        """For a single token's result, and what may be written beyond it."""
        return torch.empty(1, self._stride)

    @functools.cached_property
    def _single(self) -> Tensor:
        return self._memory[:, : self._rows]

    @property
    def nbytes(self) -> int:
        return sum(segment.nbytes for segment in self._segments)

    def __call__(self, x: Tensor, bias: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        tokens = x.shape[0]
        if tokens < self._unpack_from:
            result = self._by_bytes(x, tokens, prologue)
        else:
            result = self._by_unpacking(x, tokens, prologue)
        if bias is not None:
            result.add_(bias)
        return result if self._dtype is torch.float32 else result.to(self._dtype)

    def _by_bytes(self, x: Tensor, tokens: int, prologue: Prologue | None) -> Tensor:
        """Activations rounded to 8 bits, float32 out: for few of them."""
        plan = self._plans.get(prologue) or self.plan(prologue)
        exact = x if x.dtype is torch.float32 else x.float()
        if not exact.is_contiguous() and (tokens > 1 and plan.words[0] in (PLAIN, NORM)):
            exact = exact.contiguous()
        out = self._memory if tokens == 1 else torch.empty(tokens, self._stride)
        work = self._workspace.address(work_bytes(tokens, self._columns, self._blocks))
        here = (exact.data_ptr(), exact.stride(0), tokens, plan.eps, work, out.data_ptr())
        if self._threads == 1:
            linear(plan.address, *here)
        else:
            linear_by_threads(self._threads, plan.words, plan.address, *here)
        return self._single if tokens == 1 else out[:, : self._rows]

    def _by_unpacking(self, x: Tensor, tokens: int, prologue: Prologue | None) -> Tensor:
        """Tiles of rows in bfloat16 times activations in bfloat16, float32 out: for many of them."""
        x = x if prologue is None else prologue(x)
        width = self._blocks * BLOCK
        if width == self._columns:
            activations = x.bfloat16()
        else:  # where a cut goes through a block, zeros meet the others' columns
            activations = torch.zeros(tokens, width, dtype=torch.bfloat16)
            activations[:, self._lead : self._lead + self._columns] = x
        out = torch.empty(tokens, self._rows)
        height = max(1, _TILE // max(1, width * ROWS))  # in blocks of rows
        tile = self._workspace.matrix(height * ROWS, width)
        top = 0
        for segment in self._segments:
            for first in range(0, segment.row_blocks, height):
                last = min(first + height, segment.row_blocks)
                segment.unpack_into(tile, first, last, self._threads)
                start, stop = first * ROWS, min(last * ROWS, segment.rows)
                out[:, top + start : top + stop] = F.linear(activations, tile[: stop - start])
            top += segment.rows
        return out

    def plan(self, prologue: Prologue | None) -> Plan:
        """What the kernels are to do, with the addresses of all that is held."""
        kind, weight, eps = PLAIN, None, 0.0
        if isinstance(prologue, RmsNorm):
            kind, weight, eps = NORM, prologue.weight.float(), prologue.eps
        elif isinstance(prologue, Gate):
            kind = GELU_GATE if prologue.gelu else SILU_GATE
        address = 0 if weight is None else weight.data_ptr()
        words = [kind, self._columns, self._lead, self._blocks, self._stride, address, len(self._segments)]
        for segment in self._segments:
            held = [0 if t is None else t.data_ptr() for t in (segment.codes, segment.scales, segment.minimums)]
            words += [segment.form, *held, segment.rows, segment.row_blocks]
        plan = self._plans[prologue] = Plan(words, torch.tensor(words, dtype=torch.int64), weight, eps)
        return plan

    def rows(self, indices: Tensor) -> Tensor:
        out, indices = torch.zeros(len(indices), self._blocks * BLOCK), indices.contiguous()
        first = 0
        for segment in self._segments:
            segment.rows_into(out, indices, first)
            first += segment.rows
        return out[:, self._lead : self._lead + self._columns].to(self._dtype)


def _place(side_by_side: Tensor, first: int, part: Tensor, rows: int) -> None:
    """Copy `part` (rows, blocks, …) to rows `first` on of (row blocks, blocks, [chunks,] ROWS, …)."""
    lanes = side_by_side.movedim(2 if part.dim() == 2 else 3, 1)  # (row blocks, ROWS, blocks, …)
    if first % ROWS == 0 and rows % ROWS == 0:
        lanes[first // ROWS : (first + rows) // ROWS] = part.view(rows // ROWS, ROWS, *part.shape[1:])
        return
    places = torch.arange(first, first + rows)
    lanes[places // ROWS, places % ROWS] = part
