"""The all-reduce algorithms, and the one order of their sums.

Contributions are added in rank order, in float32 for the half types, and rounded once, whatever the
size and the algorithm: every rank holds the same bits. Each takes this rank's elements, flat and in
host memory, and overwrites them with the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from ringlm.ring import plan, wire
from ringlm.ring.link import Lane
from ringlm.ring.mesh import Mesh
from ringlm.ring.wire import HEADER_BYTES

Algorithm = Callable[[Mesh, torch.Tensor, bytes, float], None]

_HALVES = (torch.bfloat16, torch.float16)


def direct(mesh: Mesh, flat: torch.Tensor, header: bytes, deadline: float) -> None:
    """Everybody sends everything to everybody and sums it: one hop. For what fits the scratch."""
    add(flat, mesh.swap(header, wire.view(flat), flat.dtype, flat.numel(), deadline), mesh.rank)


def streamed(mesh: Mesh, flat: torch.Tensor, header: bytes, deadline: float) -> None:
    """Like `direct` for any length: summed segment by segment while the rest is on its way. For two ranks."""
    item = flat.element_size()
    lanes = mesh.lanes(header, wire.view(flat))
    mesh.await_headers(lanes, header, deadline)
    for segment in plan.segments(plan.Span(0, flat.numel()), mesh.segment_bytes // item):
        contributions = []
        for lane in lanes:
            scratch, into = mesh.scratch(lane.link.peer, flat.dtype, segment.stop - segment.start)
            lane.receive(into)
            contributions.append(scratch)
        # The sum must not overtake the send: what it overwrites has to be gone.
        mesh.pump(lanes, deadline, sent=HEADER_BYTES + segment.stop * item)
        add(flat[segment.start : segment.stop], contributions, mesh.rank)


def through_rank_0(mesh: Mesh, flat: torch.Tensor, header: bytes, deadline: float) -> None:
    """Rank 0 sums and answers: the fewest wake-ups when ranks share cores. For what fits the scratch."""
    data = wire.view(flat)
    if mesh.rank != 0:
        mesh.pump([Lane(mesh.links[0], (header, data))], deadline)
        mesh.receive(0, header, data, deadline)
        return
    contributions = []
    for peer in mesh.links:
        scratch, into = mesh.scratch(peer, flat.dtype, flat.numel())
        mesh.receive(peer, header, into, deadline)
        contributions.append(scratch)
    add(flat, contributions, 0)
    mesh.pump(mesh.lanes(header, data), deadline)


def by_owners(mesh: Mesh, flat: torch.Tensor, header: bytes, deadline: float) -> None:
    """Each rank sums one chunk, segment by segment, and sends a segment on as soon as it is summed."""
    data, item = wire.view(flat), flat.element_size()
    chunks = plan.chunks(flat.numel(), len(mesh.links) + 1)

    def memory(span: plan.Span) -> memoryview:
        return data[span.start * item : span.stop * item]

    lanes = mesh.lanes(header)
    for lane in lanes:
        lane.send(memory(chunks[lane.link.peer]))
    mesh.await_headers(lanes, header, deadline)
    for segment in plan.segments(chunks[mesh.rank], mesh.segment_bytes // item):
        contributions = []
        for lane in lanes:
            scratch, into = mesh.scratch(lane.link.peer, flat.dtype, segment.stop - segment.start)
            lane.receive(into)
            contributions.append(scratch)
        mesh.pump(lanes, deadline, sent=0)
        add(flat[segment.start : segment.stop], contributions, mesh.rank)
        for lane in lanes:
            lane.send(memory(segment))
    for lane in lanes:
        lane.receive(memory(chunks[lane.link.peer]))
    mesh.pump(lanes, deadline)


def add(mine: torch.Tensor, others: Sequence[torch.Tensor], rank: int) -> None:
    """Sum all contributions in rank order into `mine`, rank `rank`'s; `others`, the rest in order, are spoilt."""
    if len(others) == 1:
        mine.add_(others[0])  # torch adds halves in float32 and rounds once; addition commutes
        return
    ordered = [*others[:rank], mine, *others[rank:]]
    if mine.dtype in _HALVES:
        total = ordered[0].float()
        for contribution in ordered[1:]:
            total.add_(contribution)
        mine.copy_(total)
        return
    total = ordered[0]
    for contribution in ordered[1:]:
        if contribution is mine:  # addition commutes, so the order of the sum is kept
            mine.add_(total)
            total = mine
        else:
            total.add_(contribution)
