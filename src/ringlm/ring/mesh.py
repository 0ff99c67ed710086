"""The data links to all peers, and whole messages over them: header, then body.

A header is checked before its body is awaited, so that ranks which called different collectives both
learn it, and no wrong sum comes about. What it does not know: what is done with the bodies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ringlm.errors import DesyncError
from ringlm.ring import wire
from ringlm.ring.link import Lane, Link, pump
from ringlm.ring.wire import HEADER_BYTES

_MAX_SLICES = 256


class Mesh:
    """Links by rank, in rank order, and a scratch segment for what each peer sends.

    `spin_s` is how long a waiting rank yields its core before it sleeps. Times are `time.perf_counter`'s.
    """

    def __init__(self, rank: int, links: Sequence[Link], spin_s: float, segment_bytes: int) -> None:
        self.rank = rank
        self.links = {link.peer: link for link in sorted(links, key=lambda link: link.peer)}
        self.segment_bytes = segment_bytes
        self._spin_s = spin_s
        self._scratch = {peer: torch.empty(segment_bytes, dtype=torch.uint8) for peer in self.links}
        self._slices: dict[tuple[int, torch.dtype, int], tuple[torch.Tensor, memoryview]] = {}

    def lanes(self, *outgoing: memoryview | bytes) -> list[Lane]:
        """A lane to every peer, with the same bytes to send."""
        return [Lane(link, outgoing) for link in self.links.values()]

    def pump(self, lanes: Sequence[Lane], deadline: float, sent: int | None = None) -> None:
        """See `link.pump`."""
        pump(lanes, deadline, self._spin_s, sent=sent)

    def scratch(self, peer: int, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, memoryview]:
        """The first `length` elements of the peer's scratch, as a tensor and as bytes."""
        key = (peer, dtype, length)
        found = self._slices.get(key)
        if found is None:
            if len(self._slices) >= _MAX_SLICES:
                self._slices.clear()
            tensor = self._scratch[peer][: length * dtype.itemsize].view(dtype)
            found = self._slices[key] = tensor, wire.view(tensor)
        return found

    def swap(
        self, header: bytes, out: memoryview, dtype: torch.dtype, length: int, deadline: float
    ) -> list[torch.Tensor]:
        """Send `out` (`length` elements) to every peer and receive as much from each: scratch, in rank order."""
        whole = HEADER_BYTES + len(out)
        message = (header, out)
        sent = [link.send_first(message) for link in self.links.values()]
        contributions, rest = [], []
        for link, nbytes in zip(self.links.values(), sent, strict=True):
            scratch, into = self.scratch(link.peer, dtype, length)
            contributions.append(scratch)
            # Sleeping on one link is safe only once nothing is left to send on it.
            got = link.receive_first(into, self._spin_s) if nbytes == whole else 0
            if got >= HEADER_BYTES and link.header != header:
                raise self.desync(link, header)
            if nbytes < whole or got < whole:
                rest.append(self._rest(link, header, out, nbytes, into, got, deadline))
        if rest:
            self.pump(rest, deadline)
        return contributions

    def receive(self, peer: int, header: bytes, into: memoryview, deadline: float) -> None:
        """One whole message whose header must equal `header`."""
        link = self.links[peer]
        got = link.receive_first(into, self._spin_s)
        if got >= HEADER_BYTES and link.header != header:
            raise self.desync(link, header)
        if got < HEADER_BYTES + len(into):
            nothing = memoryview(b"")
            self.pump([self._rest(link, header, nothing, HEADER_BYTES, into, got, deadline)], deadline)

    def await_headers(self, lanes: Sequence[Lane], header: bytes, deadline: float) -> None:
        """Every peer's header, which must equal `header`, while queued bytes go out."""
        for lane in lanes:
            lane.receive(memoryview(lane.link.header))
        self.pump(lanes, deadline, sent=0)
        for lane in lanes:
            if lane.link.header != header:
                raise self.desync(lane.link, header)

    def await_size(self, peer: int, header: bytes, deadline: float) -> int:
        """The size that the peer's header announces; the rest of it must equal `header`."""
        lane = Lane(self.links[peer])
        lane.receive(memoryview(lane.link.header))
        self.pump([lane], deadline)
        theirs = lane.link.header
        nbytes = int.from_bytes(theirs[-8:], "little")
        if theirs[:-8] != header[:-8] or nbytes > wire.MAX_MESSAGE_BYTES:
            raise self.desync(lane.link, header)
        return nbytes

    def desync(self, link: Link, header: bytes, why: str = "") -> DesyncError:
        """The error for a peer whose header says something else."""
        text = wire.mismatch(self.rank, header, link.name, link.header)
        return DesyncError(f"{text} ({why}.)" if why else text, link.peer)

    def _rest(
        self, link: Link, header: bytes, out: memoryview, sent: int, into: memoryview, got: int, deadline: float
    ) -> Lane:
        """What is left of a swap of which a part has moved, once the peer's header is here and right."""
        lane = Lane(link, (header[sent:], out[max(0, sent - HEADER_BYTES) :]))
        if got < HEADER_BYTES:
            lane.receive(memoryview(link.header)[got:])
            self.pump([lane], deadline, sent=0)
            if link.header != header:
                raise self.desync(link, header)
        lane.receive(into[max(0, got - HEADER_BYTES) :])
        return lane
