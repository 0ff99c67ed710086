"""The sum of sparse tensors over all ranks, each of which may have other elements. Knows the ring alone."""

from __future__ import annotations

import torch

from ringlm.ring.collectives import Collectives


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
