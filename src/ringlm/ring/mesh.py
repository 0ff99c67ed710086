"""The links from one rank to the others of its group, and whole messages over them.

Ranks here are those of the group. A header is checked before its body is awaited, so that ranks which
called different collectives both learn it, and no wrong sum comes about. What it does not know: what is
done with the bodies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import torch

from ringlm.ring import wire
from ringlm.ring.lane import Lane
from ringlm.ring.link import Link
from ringlm.ring.patience import Patience

if TYPE_CHECKING:
    from ringlm.ring.swap import Swap

_MAX_SWAPS: Final = 64
_MAX_SEALED_BYTES: Final = 1 << 15  # of a swap, each of which has its own memory


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
        self._sealed = [link.seal is not None for link in self._ordered]
        self._swaps: dict[tuple[torch.dtype, int], Swap] = {}

    def lane(self, peer: int, call: bytes) -> Lane:
        """An empty lane to `peer`."""
        return Lane(self.links[peer], call, self.segment_bytes, self.rank)

    def lanes(self, call: bytes) -> dict[int, Lane]:
        """An empty lane to every peer."""
        return {peer: self.lane(peer, call) for peer in self.links}

    @staticmethod
    def pump(lanes: Sequence[Lane], deadline: float, *, received: bool = False) -> None:
        """Move bytes until every lane has sent and received all that it holds; with `received`, received it.

        Raises what `Lane.move` does, or CollectiveTimeoutError naming the first peer that is behind at
        `deadline` (on `time.perf_counter`).
        """
        wait = Patience(deadline)
        while True:
            moved = False
            for lane in lanes:
                moved |= lane.move()
            waiting = [lane for lane in lanes if lane.receiving or (lane.sending and not received)]
            if not waiting:
                return
            if moved:
                wait.restart()
            else:
                wait.turn([(lane.link, lane.receiving, lane.sending) for lane in lanes], waiting[0].link)

    def swap(self, call: bytes, flat: torch.Tensor, deadline: float, *, add: bool) -> list[torch.Tensor]:
        """Send `flat` (one frame) to every peer and receive as much from each: scratch, in rank order. With `add`, and
        where that is the fastest, what came is added to `flat` already, and nothing is returned."""
        key = flat.dtype, flat.numel()
        swap = self._swaps.get(key) or self._prepare(*key)
        if swap is None:
            return self._exchange(call, flat, deadline)
        add = add and swap.adds
        if swap(call, flat, add):
            for link in self._ordered:
                link.sent += swap.whole
                link.received += swap.whole
            return [] if add else swap.contributions
        rest = []
        for index, link in enumerate(self._ordered):
            sent, got, right = swap.progress(index)
            link.sent += sent
            link.received += got
            if not right:
                lane = Lane(link, call, self.segment_bytes, self.rank)
                swap.resume(index, lane, call, flat)
                rest.append(lane)
        self.pump(rest, deadline)
        return swap.contributions

    def _exchange(self, call: bytes, flat: torch.Tensor, deadline: float) -> list[torch.Tensor]:
        """What `swap` does, over links of any kind."""
        out, contributions, lanes = wire.view(flat), [], []
        for link in self._ordered:
            lane = Lane(link, call, self.segment_bytes, self.rank)
            scratch, into = link.scratch(flat.dtype, flat.numel())
            lane.send(out)
            lane.receive(into)
            lanes.append(lane)
            contributions.append(scratch)
        self.pump(lanes, deadline)
        return contributions

    def _prepare(self, dtype: torch.dtype, length: int) -> Swap | None:
        """What `swap` needs for tensors like this one, remembered for the next; None where lanes are better."""
        from ringlm.ring.swap import SealedSwap, Swap  # with it comes a compiler

        if any(self._sealed) and (length * dtype.itemsize > _MAX_SEALED_BYTES or not all(self._sealed)):
            return None
        if len(self._swaps) >= _MAX_SWAPS:
            self._swaps.clear()
        kind = SealedSwap if any(self._sealed) else Swap
        swap = self._swaps[dtype, length] = kind(self._ordered, dtype, length)
        return swap
