"""Which algorithm carries a collective: the one table, and the figures behind it (docs/ring.md has them).

    exchange  every message straight from its owner to who needs it
    direct    everything to everybody, combined everywhere: one hop
    owners    each rank combines its chunk of the tensor, in segments, and sends them on
    chain     partial results from rank to rank up the chain, segment by segment, the total back down

Not among them: recursive doubling, which adds in another order than that of the ranks, and a star by way of rank 0,
which with more ranks than cores takes a tenth less from four ranks on, and with three a tenth more.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Algorithm = Literal["exchange", "direct", "owners", "chain"]
Topology = Literal["mesh", "chain"]  # links between all pairs, or some by way of other ranks

REDUCING = ("all_reduce", "barrier", "reduce", "reduce_scatter")


class Limits(NamedTuple):
    """Sizes of whole tensors, in bytes, up to which the first of two algorithms is the faster."""

    direct: int = 1 << 15
    direct_of_two: int = 1 << 19  # summing everything twice beats awaiting the other's sums


def choose(
    operation: str,
    nbytes: int,
    world_size: int,
    topology: Topology = "mesh",
    limits: Limits = Limits(),  # noqa: B008  it is immutable
) -> Algorithm:
    """The algorithm, the same on every rank."""
    if operation not in REDUCING:
        return "exchange"
    if operation in ("reduce", "reduce_scatter"):
        return "owners"
    if nbytes <= (limits.direct_of_two if world_size == 2 else limits.direct):
        return "direct"
    return "chain" if topology == "chain" else "owners"


class Row(NamedTuple):
    """One line of the table: up to `nbytes` (None: any more), `algorithm`."""

    operation: str
    nbytes: int | None
    algorithm: Algorithm


def table(world_size: int, topology: Topology = "mesh") -> list[Row]:
    """The whole choice for one ring, as rows to print."""
    limits = Limits()
    rows: list[Row] = []
    for operation in ("all_reduce", "barrier", "reduce", "reduce_scatter", "all others"):
        sizes = [0] if operation == "barrier" else [*sorted(set(limits)), max(limits) + 1]
        found = [(size, choose(operation, size, world_size, topology)) for size in sizes]
        for (size, algorithm), following in zip(found, [*found[1:], (0, None)], strict=True):
            if algorithm != following[1]:
                rows.append(Row(operation, None if following[1] is None else size, algorithm))
    return rows
