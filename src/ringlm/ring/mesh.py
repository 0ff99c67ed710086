"""The links from one rank to the others of its group, and whole messages over them.

Ranks here are those of the group. A header is checked before its body is awaited, so that ranks which
called different collectives both learn it, and no wrong sum comes about. What it does not know: what is
done with the bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ringlm.ring import wire
from ringlm.ring.lane import Lane, pump
from ringlm.ring.link import Link
from ringlm.ring.wire import HEADER_BYTES


class Mesh:
    """Links by rank, in rank order.

    A frame carries `segment_bytes` at most. Times are `time.perf_counter`'s.
    """

    def __init__(self, rank: int, links: Mapping[int, Link], segment_bytes: int) -> None:
        self.rank = rank
        self.links = dict(sorted(links.items()))
        self.world_size = len(self.links) + 1
        self._ordered = tuple(self.links.values())
        self.segment_bytes = segment_bytes

    def lane(self, peer: int, call: bytes) -> Lane:
        """An empty lane to `peer`."""
        return Lane(self.links[peer], call, self.segment_bytes, self.rank)

    def lanes(self, call: bytes) -> dict[int, Lane]:
        """An empty lane to every peer."""
        return {peer: self.lane(peer, call) for peer in self.links}

    def pump(self, lanes: Sequence[Lane], deadline: float, *, received: bool = False) -> None:
        """See `lane.pump`."""
        pump(lanes, deadline, received=received)

    def swap(
        self, call: bytes, out: memoryview, dtype: torch.dtype, length: int, deadline: float
    ) -> list[torch.Tensor]:
        """Send `out` (`length` elements, one frame) to every peer and receive as much from each: scratch, in
        rank order."""
        whole = HEADER_BYTES + len(out)
        head = call + wire.digest(out)
        message = (head, out)
        sent = [link.send_first(message) for link in self._ordered]
        contributions, rest = [], []
        for link, nbytes in zip(self._ordered, sent, strict=True):
            scratch, into = link.scratch(dtype, length)
            contributions.append(scratch)
            # Sleeping on one link is safe only once nothing is left to send on it.
            got = link.receive_first(into) if nbytes == whole else 0
            if nbytes < whole or got < whole or link.header != call + wire.digest(into):
                lane = Lane(link, call, self.segment_bytes, self.rank)
                lane.resume(head, out, nbytes)
                lane.receive_rest(into, got)
                rest.append(lane)
        if rest:
            self.pump(rest, deadline)
        return contributions
