"""The all-reduce algorithms: which rank combines what, and when the bytes move.

Each takes this rank's elements, flat and in host memory, and overwrites them with the result. Which one
is taken is `algorithms.choose`'s matter, in which order contributions are combined `combine`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch

from ringlm.ring import plan, wire
from ringlm.ring.combine import combine, finish, pass_on
from ringlm.ring.lane import Lane
from ringlm.ring.mesh import Mesh

Algorithm = Callable[[Mesh, torch.Tensor, str, bytes, float], None]  # mesh, elements, reduction, call, deadline


def direct(mesh: Mesh, flat: torch.Tensor, reduction: str, call: bytes, deadline: float) -> None:
    """Everybody sends everything to everybody and combines it: one hop. One frame at most."""
    contributions = mesh.swap(call, flat, deadline, add=reduction == "sum")
    if contributions:
        combine(reduction, flat, contributions, mesh.rank)


def scattered(
    mesh: Mesh,
    parts: Sequence[torch.Tensor],
    out: torch.Tensor,
    reduction: str,
    calls: Mapping[int, bytes],
    deadline: float,
) -> None:
    """Each rank combines everybody's part of its number into `out`, which holds its own: half of `owners`.

    `parts` are flat, by rank, and `calls` those of the messages about each.
    """
    lanes = mesh.lanes(calls[mesh.rank])
    for peer, lane in lanes.items():
        lane.send(wire.view(parts[peer]), calls[peer])
    _combine_segments(mesh, out, reduction, lanes, deadline, share=False)
    mesh.pump(list(lanes.values()), deadline)


def to_root(mesh: Mesh, flat: torch.Tensor, root: int, reduction: str, call: bytes, deadline: float) -> None:
    """Rank `root` combines everything, segment by segment; the others' elements stay as they are."""
    if mesh.rank == root:
        _combine_segments(mesh, flat, reduction, mesh.lanes(call), deadline, share=False)
        return
    lane = mesh.lane(root, call)
    lane.send(wire.view(flat))
    mesh.pump([lane], deadline)


def owners(mesh: Mesh, flat: torch.Tensor, reduction: str, call: bytes, deadline: float) -> None:
    """Each rank combines one chunk, segment by segment, and sends a segment on as soon as it is combined."""
    data, item = wire.view(flat), flat.element_size()
    chunks = plan.chunks(flat.numel(), mesh.world_size)

    def memory(span: plan.Span) -> memoryview:
        return data[span.start * item : span.stop * item]

    lanes = mesh.lanes(call)
    for peer, lane in lanes.items():
        lane.send(memory(chunks[peer]))
    mine = chunks[mesh.rank]
    _combine_segments(mesh, flat[mine.start : mine.stop], reduction, lanes, deadline, share=True)
    for peer, lane in lanes.items():
        lane.receive(memory(chunks[peer]))
    mesh.pump(list(lanes.values()), deadline)


def _combine_segments(
    mesh: Mesh, out: torch.Tensor, reduction: str, lanes: Mapping[int, Lane], deadline: float, share: bool
) -> None:
    """Combine what every peer sends of `out`, segment by segment while the rest is on its way."""
    data, item = wire.view(out), out.element_size()
    for segment in plan.segments(plan.Span(0, out.numel()), mesh.segment_bytes // item):
        contributions = []
        for lane in lanes.values():
            scratch, into = lane.link.scratch(out.dtype, segment.stop - segment.start)
            lane.receive(into)
            contributions.append(scratch)
        mesh.pump(list(lanes.values()), deadline, received=True)
        combine(reduction, out[segment.start : segment.stop], contributions, mesh.rank)
        if share:
            memory = data[segment.start * item : segment.stop * item]
            digest = wire.digest(memory)
            for lane in lanes.values():
                lane.send(memory, digest=digest)


def chain(mesh: Mesh, flat: torch.Tensor, reduction: str, call: bytes, deadline: float) -> None:
    """Partial results go from rank to rank up the chain, segment by segment, and the total back down.

    Only neighbours exchange bytes, each its tensor once in either direction, and a rank has one segment to
    think of at a time. A half type is rounded at every rank: other bits than those of the other algorithms.
    """
    data, item, last = wire.view(flat), flat.element_size(), mesh.world_size - 1
    before = mesh.lane(mesh.rank - 1, call) if mesh.rank > 0 else None
    after = mesh.lane(mesh.rank + 1, call) if mesh.rank < last else None

    def arrived(segment: plan.Span, scratch: torch.Tensor | None) -> None:
        """The ranks before have combined theirs: combine this rank's, and go on."""
        memory = data[segment.start * item : segment.stop * item]
        mine = flat[segment.start : segment.stop]
        if scratch is not None:
            pass_on(reduction, scratch, mine)
        if after is None:
            finish(reduction, mine, mesh.world_size)
            if before is not None:
                before.send(memory)
        else:
            after.send(memory)
            after.receive(memory, then=partial(pass_back, memory))  # which comes after it has gone

    def pass_back(memory: memoryview) -> None:
        if before is not None and after is not None:
            before.send(memory, digest=after.digest)

    for segment in plan.segments(plan.Span(0, flat.numel()), mesh.segment_bytes // item):
        if before is None:
            arrived(segment, None)
        else:
            scratch, into = before.link.scratch(flat.dtype, segment.stop - segment.start)
            before.receive(into, then=partial(arrived, segment, scratch))
    mesh.pump([lane for lane in (before, after) if lane is not None], deadline)
