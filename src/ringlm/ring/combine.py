"""The reductions, and the one order in which contributions are combined.

In rank order, in float32 for the half types, and rounded once, whatever the size and the algorithm:
every rank holds the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringlm.ring.wire import REDUCTIONS

_APPLY: dict[str, Callable[..., torch.Tensor]] = {
    "sum": torch.add,
    "avg": torch.add,
    "product": torch.mul,
    "min": torch.minimum,
    "max": torch.maximum,
    "and": torch.bitwise_and,
    "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}
HALVES = (torch.bfloat16, torch.float16)
_ROUNDED = ("sum", "avg", "product")
_MOVED_ONLY = (torch.float8_e4m3fn, torch.float8_e5m2)


def check(reduction: str, dtype: torch.dtype) -> None:
    """Raises ValueError for a reduction that does not exist, or not for this dtype."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"there is no reduction {reduction!r}; there are {', '.join(REDUCTIONS)}.")
    inexact = dtype.is_floating_point or dtype.is_complex
    if (
        dtype in _MOVED_ONLY
        or (reduction in ("and", "or", "xor") and inexact)
        or (reduction == "avg" and not inexact)
        or (reduction in ("min", "max") and dtype.is_complex)
    ):
        raise ValueError(f"{reduction!r} is not defined for {dtype}.")


def combine(reduction: str, mine: torch.Tensor, others: Sequence[torch.Tensor], rank: int) -> None:
    """All contributions in rank order into `mine`, rank `rank`'s; `others`, the rest in order, are spoilt."""
    if len(others) == 1 and reduction == "sum":
        mine.add_(others[0])  # torch adds halves in float32 and rounds once; addition commutes
        return
    apply = _APPLY[reduction]
    ordered = [*others[:rank], mine, *others[rank:]]
    if mine.dtype in HALVES and reduction in _ROUNDED:
        total = ordered[0].float()
        for contribution in ordered[1:]:
            apply(total, contribution, out=total)
        if reduction == "avg":
            total.div_(len(ordered))
        mine.copy_(total)
        return
    total = ordered[0]
    for contribution in ordered[1:]:
        # Whatever is spoilt on the way, from this rank's own on it all goes there. In this order even of
        # two: which zero is the smaller, and which NaN survives, depends on it.
        total = apply(total, contribution, out=mine if contribution is mine or total is mine else total)
    finish(reduction, mine, len(ordered))


def pass_on(reduction: str, partial: torch.Tensor, mine: torch.Tensor) -> None:
    """`mine` becomes what the ranks before have made of theirs, and mine. Halves are rounded at every rank."""
    _APPLY[reduction](partial, mine, out=mine)


def finish(reduction: str, total: torch.Tensor, world_size: int) -> None:
    """What is left to do with all contributions combined."""
    if reduction == "avg":
        total.div_(world_size)
