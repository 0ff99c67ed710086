"""Tensors as the ring's collectives take them: without gradients, of dtypes that it carries, in parts by rank.

What is written to has to be the tensor's own memory, so parts are views, and `view` raises where there can be none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringlm.ring.wire import DTYPES


def bare(tensor: torch.Tensor) -> torch.Tensor:
    """The same elements; as bytes where the ring does not know their dtype and only moves them."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.dtype in DTYPES else tensor.view(-1).view(torch.uint8)


def flat(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a contiguous tensor in one dimension."""
    return bare(tensor).view(-1)


def cut(tensor: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
    """As many equal parts, flat. Raises ValueError where there can be none."""
    if tensor.numel() % count:
        raise ValueError(f"{tensor.numel()} elements cannot be divided among {count} ranks.")
    return flat(tensor).chunk(count) if tensor.numel() else [flat(tensor)] * count


def parts(tensor: torch.Tensor, sizes: Sequence[int], count: int) -> Sequence[torch.Tensor]:
    """Parts along dim 0 of these sizes, or of equal ones, flat."""
    if not sizes:
        return cut(tensor, count)
    row = tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0
    scale = flat(tensor).numel() // max(1, tensor.numel())  # bytes an element, of a dtype that is moved as bytes
    return flat(tensor).split_with_sizes([size * row * scale for size in sizes])
