"""The collectives of a group of ranks: what each gives, what each takes, and by which algorithm.

A collective is a plan (which bytes go to which rank, which come from where) that `Mesh.pump` carries
out. What it does not know: how the links came to be, models, requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from ringlm.ring import combine, reducing, wire
from ringlm.ring.algorithms import Limits, Topology, choose
from ringlm.ring.letters import Letters
from ringlm.ring.mesh import Mesh
from ringlm.ring.moving import Moving
from ringlm.ring.wire import Operation

if TYPE_CHECKING:
    from ringlm.ring.ring import Ring

_MAX_CHOICES = 256
_REDUCERS: dict[str, reducing.Algorithm] = {
    "direct": reducing.direct,
    "owners": reducing.owners,
    "chain": reducing.chain,
}


class Collectives(Moving, Letters):
    """What the ranks of a group do together. All of them call the same collectives in the same order.

    `rank` and `world_size` are those of the group. Tensors are of any shape and layout, on any device, of
    a dtype in `wire.DTYPES`; those that are not contiguous in host memory go through a copy. `reduction` is
    sum, avg, product, min, max, and, or, xor. Everything raises PeerLostError, CollectiveTimeoutError or
    DesyncError, which end the ring on all ranks, and ValueError, before anything moves, for a mistake.
    """

    def __init__(self, ring: Ring, mesh: Mesh, group: int, topology: Topology, limits: Limits) -> None:
        super().__init__(ring, mesh, group)
        self.topology = topology
        self._limits = limits
        self._choices: dict[tuple[int, torch.dtype, str], tuple[reducing.Algorithm, tuple[int, ...]]] = {}

    def all_reduce(self, tensor: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        """Combine `tensor` over all ranks, in place; the same bits on every rank. Returns `tensor`.

        One shape and dtype on all ranks. Halves are combined in float32 in rank order and rounded once.
        """
        if self.world_size == 1:
            return tensor
        flat = self._staging.host(tensor)
        algorithm, fields = self._choices.get((flat.nbytes, flat.dtype, reduction)) or self._choose(flat, reduction)
        self._guard(self._next(fields), algorithm, self._mesh, flat, reduction)
        return self._staging.give(tensor, flat)

    def reduce(self, tensor: torch.Tensor, root: int = 0, reduction: str = "sum") -> torch.Tensor:
        """Combine `tensor` over all ranks into rank `root`'s; the others' stay. Returns `tensor`."""
        combine.check(reduction, tensor.dtype)
        flat = self._staging.host(tensor)
        move = partial(reducing.to_root, self._mesh, flat, root, reduction)
        self._run(Operation.REDUCE, flat.dtype, root, flat.nbytes, move, reduction)
        return self._staging.give(tensor, flat) if self.rank == root else tensor

    def reduce_scatter(
        self, pieces: Sequence[torch.Tensor], reduction: str = "sum", out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Combine everybody's `pieces[rank]` on that rank, and return it there, in `out` if given.

        As many pieces as ranks, of one dtype; sizes may differ from piece to piece, but not from rank to rank.
        """
        self._one_a_rank(pieces)
        dtype = pieces[0].dtype
        combine.check(reduction, dtype)
        flats = self._staging.take(pieces)
        own = flats[self.rank]
        out = torch.empty_like(pieces[self.rank]) if out is None else self._same(out, pieces[self.rank])
        (result,) = self._staging.take([out], read=False)
        result.copy_(own)

        def move(call: bytes, deadline: float) -> None:
            calls = {peer: wire.resized(call, flat.nbytes) for peer, flat in enumerate(flats)}
            reducing.scattered(self._mesh, flats, result, reduction, calls, deadline)

        self._run(Operation.REDUCE_SCATTER, dtype, 0, own.nbytes, move, reduction)
        return self._staging.give(out, result)

    def barrier(self) -> None:
        """Return once every rank has called this."""
        nothing = torch.empty(0, dtype=torch.uint8)
        algorithm = _REDUCERS[self.algorithm("barrier", 0)]
        self._run(Operation.BARRIER, nothing.dtype, 0, 0, partial(algorithm, self._mesh, nothing, "sum"))

    def algorithm(self, operation: str, nbytes: int) -> str:
        """What `algorithms.choose` says for this group."""
        return choose(operation, nbytes, self.world_size, self.topology, self._limits)

    def _choose(self, flat: torch.Tensor, reduction: str) -> tuple[reducing.Algorithm, tuple[int, ...]]:
        """The algorithm of an all_reduce and the fields of its call, remembered for the next one of its kind. Raises
        ValueError."""
        combine.check(reduction, flat.dtype)
        if len(self._choices) >= _MAX_CHOICES:
            self._choices.clear()
        fields = (Operation.ALL_REDUCE.value, self._code(flat.dtype), wire.REDUCTIONS[reduction], 0, flat.nbytes)
        found = _REDUCERS[self.algorithm("all_reduce", flat.nbytes)], fields
        self._choices[flat.nbytes, flat.dtype, reduction] = found
        return found
