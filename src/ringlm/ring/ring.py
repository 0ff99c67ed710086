"""The ring itself: all ranks' collectives, their groups, the background, and how a ring ends.

What it does not know: models, requests, how the links came to be.
"""

from __future__ import annotations

import socket
import zlib
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

from ringlm.errors import PeerError, PeerLostError, RingError
from ringlm.ring import letters
from ringlm.ring.address import is_loopback
from ringlm.ring.admission import Admission
from ringlm.ring.algorithms import Limits
from ringlm.ring.background import Background, Handle
from ringlm.ring.calls import last_words
from ringlm.ring.collectives import Collectives
from ringlm.ring.control import ControlPlane
from ringlm.ring.handshake import Place
from ringlm.ring.link import Link
from ringlm.ring.listener import Listener
from ringlm.ring.mesh import Mesh
from ringlm.ring.relay import Relays
from ringlm.ring.same_machine import own_host

SEGMENT_BYTES = 1 << 19  # received, combined and forwarded while still in the cache; a frame at most

_T = TypeVar("_T")
_P = ParamSpec("_P")


class LinkFigures(NamedTuple):
    """Bytes to and from `rank` so far, frames' headers included, and the control link's last round trip."""

    rank: int
    sent_bytes: int
    received_bytes: int
    round_trip_s: float | None


class Ring(Collectives):
    """Connected ranks: the collectives of all of them, called from one thread.

    A failed collective ends the ring on all ranks: each raises the error that names the cause, at once
    and from then on. `seconds` adds up the time spent in collectives.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        links: Sequence[Link],
        *,
        control: ControlPlane | None = None,
        door: Admission | None = None,
        listener: Listener | None = None,
        relays: Relays | None = None,
        timeout_s: float = float("inf"),
        here: Sequence[int] = (),
        first: Place | None = None,
        relayed: Collection[tuple[int, int]] = (),
        epoch: int = 0,
        segment_bytes: int = SEGMENT_BYTES,
        limits: Limits = Limits(),  # noqa: B008  it is immutable
    ) -> None:
        self.here = tuple(here) or (rank,)  # the ranks on this rank's machine
        self.first = first  # where rank 0 listens
        self.epoch = epoch
        self.timeout_s = timeout_s
        self.seconds = 0.0
        self.call = b""  # the one under way
        self._links = {link.peer: link for link in links}
        self._relayed = relayed
        self._segment_bytes = segment_bytes
        mesh = Mesh(rank, self._links, segment_bytes)
        super().__init__(self, mesh, 0, "chain" if relayed else "mesh", limits)
        self._control = control
        self._door = door
        self._listener = listener  # one of its own, for this ring alone
        self._relays = relays
        self.background: Background | None = None
        self._expected: list[Handle[int]] = []
        self._groups: dict[tuple[int, ...], int] = {}
        self._error: RingError | None = None
        self._closed = False
        if control is not None:
            control.start(lambda: self.call, self._end, self._traffic)

    def group(self, ranks: Sequence[int]) -> Collectives:
        """The collectives of some ranks, numbered in the order of their ranks here; those call this, the
        others do not. Calls of several groups that share two ranks come in one order on both.

        Raises ValueError where this rank is not among them.
        """
        members = tuple(sorted(set(ranks)))
        if self.rank not in members or members[0] < 0 or members[-1] >= self.world_size:
            raise ValueError(f"rank {self.rank} of {self.world_size} can make no group of ranks {list(ranks)}.")
        count = self._groups[members] = self._groups.get(members, 0) + 1
        number = zlib.crc32(repr((members, count)).encode()) or 1  # the same on its ranks, without a word
        links = {index: self._links[peer] for index, peer in enumerate(members) if peer != self.rank}
        mesh = Mesh(members.index(self.rank), links, self._segment_bytes)
        chained = any(one in members and other in members for one, other in self._relayed)
        return Collectives(self, mesh, number, "chain" if chained else "mesh", self._limits)

    def submit(self, call: Callable[_P, _T], *arguments: _P.args, **options: _P.kwargs) -> Handle[_T]:
        """Make `call`, a collective of this ring or of its groups, in the background: `ring.submit(
        ring.all_reduce, tensor)`. Those submitted are made in order, and a call made directly follows them.
        """
        self.check()
        return self.turn.submit(partial(call, *arguments, **options))

    @property
    def turn(self) -> Background:
        """A context for one of several threads: what it calls directly follows all that was submitted, and nobody else
        calls anything meanwhile."""
        if self.background is None:
            self.background = Background(self._attend, lambda: any(not handle.done() for handle in self._expected))
        return self.background

    # -- ending --------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        """Whether this rank is within a collective."""
        return bool(self.call)

    @property
    def host(self) -> str:
        """The address at which the others reach this rank's machine; loopback's where all are on it."""
        hosts = [own_host(link.sock) for link in self._links.values()]
        return next((host for host in hosts if not is_loopback(host)), "127.0.0.1")

    def figures(self) -> list[LinkFigures]:
        """Of every data link, by rank."""
        trips = self._control.round_trip_s if self._control is not None else lambda _: None
        return [LinkFigures(peer, link.sent, link.received, trips(peer)) for peer, link in sorted(self._links.items())]

    def others(self) -> list[tuple[int, int, int, int]]:
        """Of links between other ranks, on rank 0: (rank, a higher one, bytes there, bytes back), a second old."""
        told = {} if self._control is None else self._control.traffic()
        return [(rank, *link) for rank, links in told.items() for link in links]

    def _traffic(self) -> list[tuple[int, int, int]]:
        links = sorted(self._links.items())
        return [(peer, link.sent, link.received) for peer, link in links if peer > self.rank]

    @property
    def slow(self) -> dict[int, float]:
        """On rank 0, by rank, who has computed for how many times as long as the others lately: three, or more."""
        return {} if self._control is None else self._control.slow

    def check(self) -> None:
        """Raise what ended the ring, if it has ended: for a rank that has nothing to do meanwhile."""
        if self._error is not None:
            raise self._error.with_traceback(None)

    def abort(self, text: str) -> None:
        """End the ring on every rank: this one has failed, and `text` are its last words. From any thread."""
        if self._control is not None:
            self._control.fail(PeerLostError(f"rank {self.rank} failed: {text}", self.rank))

    def close(self) -> None:
        """Leave the ring in order and free everything it holds. Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self.background is not None:
            self.background.close()
        self._error = self._error or RingError("the ring is closed.")
        self._disappoint()
        if self._door is not None:
            self._door.close()
        if self._listener is not None:
            self._listener.close()
        if self._control is not None:
            self._control.close()
        for link in self._links.values():
            link.close()
        if self._relays is not None:
            self._relays.close()  # others may still be at the last collective

    def __enter__(self) -> Ring:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is not None:
            self.abort(last_words(error))
        self.close()

    # -- for the collectives -------------------------------------------------------------------

    def settle_down(self) -> None:
        """Let what is in the background finish. Raises what ended the ring."""
        if self.background is not None:
            with self.background:
                pass
        if self._error is not None:
            raise self._error.with_traceback(None)

    def settle(self, error: PeerError) -> PeerError:
        """End the ring because of `error`, on every rank; the cause that is behind it."""
        return self._control.settle(error) if self._control is not None else error

    def _end(self, error: PeerError) -> None:
        """The ring has ended: say so from now on, and wake whoever waits on a link. Runs on any thread."""
        self._error = error
        for link in self._links.values():
            link.shut()
        self._disappoint()

    def expects(self, handle: Handle[int]) -> None:
        """A receive will wait for its letter while nothing else is done."""
        self._expected = [*(one for one in self._expected if not one.done()), handle]

    def _attend(self, awake: socket.socket) -> None:
        """Take letters that are waited for while nothing else is done; see `letters.attend`."""
        try:
            letters.attend(self._links.values(), self._segment_bytes, self.rank, awake)
        except PeerError as error:
            self.settle(error)
        except BaseException as error:
            self.abort(last_words(error))
            raise

    def _disappoint(self) -> None:
        """Tell who waits for a letter that none will come."""
        for handle in self._expected:
            handle.fail(self._error)
