"""Linear layers and embeddings of which each rank holds a part. Knows no files and no model: a layer is a
specification (which tensors, which rows or columns of them), a way of storing the matrix, a bias, and perhaps an
adapter (adapter.py).

Column-parallel layers split what comes out, row-parallel ones what goes in (Megatron-LM, arXiv:1909.08053);
a row-parallel layer is the only one that communicates: its partial sums are reduced and added to the residual.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ringlm.parallel.communicator import Communicator
from ringlm.parallel.prologue import Prologue, RmsNorm
from ringlm.parallel.shard import Range


@dataclass(frozen=True)
class Part:
    """Rows and columns of one matrix in the file, whose whole shape is `shape`, (out, in)."""

    name: str  # without ".weight" or ".bias"
    shape: tuple[int, int]
    rows: Range
    columns: Range


@dataclass(frozen=True)
class LinearSpec:
    """One product: its parts are stacked by rows in this order."""

    parts: tuple[Part, ...]
    bias: bool = False


def column_parallel(prefix: str, in_features: int, bias: bool, **outputs: tuple[int, Range]) -> LinearSpec:
    """Layers of one input, fused: for each its name after `prefix`, its whole size and this rank's rows of it."""
    every = Range(0, in_features)
    parts = (Part(prefix + name, (size, in_features), rows, every) for name, (size, rows) in outputs.items())
    return LinearSpec(tuple(parts), bias)


def fused(name: str, spec: LinearSpec) -> LinearSpec:
    """`spec` for a file in which the layers' rows follow one another in one matrix, `name`."""
    height, parts = sum(part.shape[0] for part in spec.parts), []
    top = 0
    for part in spec.parts:
        rows = Range(top + part.rows.start, top + part.rows.stop)
        parts.append(Part(name, (height, part.shape[1]), rows, part.columns))
        top += part.shape[0]
    return LinearSpec(tuple(parts), spec.bias)


def row_parallel(name: str, shape: tuple[int, int], columns: Range, bias: bool) -> LinearSpec:
    """The layer `name` of shape (out, in), of whose inputs this rank has `columns`."""
    return LinearSpec((Part(name, shape, Range(0, shape[0]), columns),), bias)


class Product(Protocol):
    """A product with a matrix (out, in): it takes activations of any dtype, and gives them in the model's."""

    @property
    def nbytes(self) -> int: ...

    def __call__(self, x: Tensor, bias: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        """x, or what `prologue` makes of it, (T, in) to (T, out), plus the bias (out,). A single token's result may be
        overwritten by the next call."""
        ...


class Storage(Product, Protocol):
    """A matrix as it lies in memory."""

    def rows(self, indices: Tensor) -> Tensor:
        """int64 (T,), each within out, to those rows (T, in); of a matrix without rows, to zeros."""
        ...


# Up to so many activations our product with an unpacked matrix is faster on a CPU than torch's (docs/performance.md).
_FEW = {
    torch.float32: 32,
    torch.float16: 32,
    torch.bfloat16: 2 if torch.cpu._is_avx512_bf16_supported() else 32,
}


class Dense:
    """The matrix as it is, in the model's dtype."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight.contiguous()
        self._few = _FEW.get(weight.dtype, 0) if weight.is_cpu else 0
        if self._few:  # once, and not at every product of a decode step
            from ringlm.parallel.kernels.dense import product  # and with it a compiler

            self._product = product

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Tensor, bias: Tensor | None = None, prologue: Prologue | None = None) -> Tensor:
        x = x if prologue is None else prologue(x)
        if 0 < x.shape[0] <= self._few:
            wide = self._product(self.weight, x)
            return (wide if bias is None else wide.add_(bias)).to(self.weight.dtype)
        return F.linear(x.to(self.weight.dtype), self.weight, bias)

    def rows(self, indices: Tensor) -> Tensor:
        if not self.weight.shape[0]:
            return self.weight.new_zeros(indices.shape[0], self.weight.shape[1])
        return F.embedding(indices, self.weight)


class ColumnParallel:
    """This rank's outputs of one or several fused layers, each with its part of the bias."""

    def __init__(self, matrix: Product, bias: Tensor | None = None, prologue: Prologue | None = None) -> None:
        self.matrix, self.bias, self.prologue = matrix, bias, prologue

    def __call__(self, x: Tensor) -> Tensor:
        """(T, what the prologue takes, or in) to (T, this rank's outputs)."""
        return self.matrix(x, self.bias, self.prologue)


class RowParallel:
    """A layer of whose inputs this rank has some; the sum over ranks, or its norm, goes straight into the residual."""

    def __init__(
        self,
        matrix: Product,
        bias: Tensor | None,
        comm: Communicator,
        prologue: Prologue | None = None,
        norm: RmsNorm | None = None,
    ) -> None:
        self.matrix, self.bias, self.comm, self.prologue, self.norm = matrix, bias, comm, prologue, norm

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        """residual, float32 (T, out), += the sum over ranks of their products with x, + bias once, normed if there is
        a norm; x is (T, this rank's inputs), or what the prologue takes."""
        total = self.comm.all_reduce(self.matrix(x, None, self.prologue))
        if self.bias is not None:
            total.add_(self.bias)
        if self.norm is None:
            residual.add_(total)
        else:
            self.norm.add_to(residual, total)


class VocabularyParallel:
    """The embedding of tokens, of which this rank holds the rows `rows`; the other ranks' tokens give zeros here."""

    def __init__(self, matrix: Storage, rows: Range, comm: Communicator) -> None:
        self.matrix, self.rows, self.comm = matrix, rows, comm

    def __call__(self, tokens: Tensor) -> Tensor:
        """int64 (T,) to (T, hidden_size), the same on every rank."""
        if self.comm.world_size == 1:
            return self.matrix.rows(tokens)
        local = tokens - self.rows.start
        elsewhere = (local < 0) | (local >= len(self.rows))
        embedded = self.matrix.rows(local.masked_fill_(elsewhere, 0))
        return self.comm.all_reduce(embedded.masked_fill_(elsewhere[:, None], 0))
