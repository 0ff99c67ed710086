"""Reductions as torch.distributed asks for them: their names, several tensors in one go, sparse ones. Knows the ring
alone."""

from __future__ import annotations

from typing import Any

import torch
from torch.distributed import ReduceOp

from ringlm.ring.collectives import Collectives

_REDUCTIONS: dict[ReduceOp, str] = {
    ReduceOp(ReduceOp.SUM): "sum",
    ReduceOp(ReduceOp.AVG): "avg",
    ReduceOp(ReduceOp.PRODUCT): "product",
    ReduceOp(ReduceOp.MIN): "min",
    ReduceOp(ReduceOp.MAX): "max",
    ReduceOp(ReduceOp.BAND): "and",
    ReduceOp(ReduceOp.BOR): "or",
    ReduceOp(ReduceOp.BXOR): "xor",
}


def reduction_of(options: Any) -> str:
    """The ring's name for it. Raises ValueError where it has none."""
    try:
        return _REDUCTIONS[options.reduceOp]
    except KeyError:
        raise ValueError(f"the backend 'ring' does not know the reduction {options.reduceOp}.") from None


def all_reduce(ring: Collectives, tensors: list[torch.Tensor], reduction: str) -> None:
    """In place; several of one dtype and device in one go."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for alike in kinds.values():
        if len(alike) == 1:
            ring.all_reduce(alike[0], reduction)
            continue
        whole = ring.all_reduce(torch.cat([tensor.detach().reshape(-1) for tensor in alike]), reduction)
        for tensor, part in zip(alike, whole.split_with_sizes([tensor.numel() for tensor in alike]), strict=True):
            tensor.detach().copy_(part.view(tensor.shape))


def all_reduce_sparse(ring: Collectives, tensor: torch.Tensor, reduction: str) -> None:
    """In place: `tensor` becomes the coalesced sum. Raises ValueError for any other reduction."""
    if reduction != "sum":
        raise ValueError(f"{reduction!r} is not defined for sparse tensors.")
    mine = tensor.detach().coalesce()
    rest = mine.values().shape[1:]
    columns = mine.values().reshape(mine._nnz(), -1).t().contiguous()  # (elements of one, ones): the last may differ
    indices = ring.all_gather(mine.indices().contiguous())
    values = [found.t().reshape(-1, *rest) for found in ring.all_gather(columns)]
    total = torch.sparse_coo_tensor(torch.cat(indices, dim=1), torch.cat(values), tensor.shape, dtype=tensor.dtype)
    with torch.no_grad():
        tensor.copy_(total.coalesce())  # of a sparse tensor `detach` shares nothing
