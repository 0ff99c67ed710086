"""How a rank comes by its place in one ring after the other: as it was told at the start, or as rank 0's rendezvous
decides. Forms the rings; knows no engine.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from ringlm.cluster.gathering import Gathering
from ringlm.cluster.joining import Member, Seat, join
from ringlm.cluster.loading import Loader
from ringlm.cluster.messages import MeasuredLink
from ringlm.cluster.settings import Settings
from ringlm.errors import ConnectError, PeerError
from ringlm.ring import Heartbeat, Ring, RingConfig, connect
from ringlm.ring.address import Address, network_id
from ringlm.ring.cards import own_place
from ringlm.ring.gauge import Gauges
from ringlm.ring.handshake import Place, RefusedError
from ringlm.ring.listener import Listener, open_listener

FORM_S: Final = 15.0  # for the ring of ranks that have all joined
TRIES: Final = 3  # to form it; who has joined may be lost again
_FOLLOW_S: Final = 2.0  # for those who join to be here, after a first ring that could not form because of them
_PAUSE_S: Final = 0.5
_HOSTS: Final = 16  # of rank 0, that fit into a welcome

log = logging.getLogger("ringlm")


class Seating:
    """A context manager: listens while it lasts. `rank`, `world_size` and `epoch` are those of the last ring, and
    `settings` what this rank brings to its agreement. On rank 0 `measured` are the links by which ranks were given, and
    `tell` hears for how many ranks it waits, and where."""

    def __init__(self, loader: Loader, tell: Callable[[str], None]) -> None:
        spec = loader.spec
        self.spec = spec
        self.settings = spec.settings
        self.rank, self.epoch = 0 if spec.ring is None else spec.ring.rank, 0
        self.leads = spec.leads
        self.rejoin_timeout_s = spec.rejoin_timeout_s  # rank 0's, once it is known
        self.loader = loader
        self._tell = tell
        self._config = spec.ring or RingConfig()
        self._heartbeat = Heartbeat()
        self.world_size = spec.world_size
        self._first = [] if spec.join is None else [spec.join]  # where rank 0 listens
        self._alone = spec.world_size == 1 and spec.join is None
        self._gathering: Gathering | None = None
        self._listener: Listener | None = None
        self._gauges = Gauges()

    def __enter__(self) -> Seating:
        spec = self.spec
        if not self._alone:
            self._listener = open_listener(self._config)
            if self.leads and (spec.awaits or spec.rejoin_timeout_s > 0):
                self._gathering = Gathering(self._listener, self.loader, self._tell, self._returned)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._gathering is not None:
            self._gathering.rendezvous.close("rank 0 has ended." if error is None else f"rank 0 has ended: {error}")
        if self._listener is not None:
            self._listener.close()
        self._gauges.close()

    def first(self, heartbeat: Heartbeat) -> Ring | None:
        """The ring that this rank was started for; None for a rank alone. Raises ConfigError, ConnectError or
        AuthenticationError."""
        self._heartbeat = heartbeat
        if self._alone:
            return None
        assert self._listener is not None
        if self.spec.join is not None or self.spec.awaits:
            return self._again(None, math.inf)
        deadline = time.monotonic() + self._config.connect_timeout_s
        while True:
            try:
                return self._connect(self._config)
            except ConnectError as error:
                # Where ranks of an earlier ring wait, this one cannot form: they meet at rank 0's.
                refused = error if isinstance(error, RefusedError) else None
                join_at = None if refused is None else refused.join
                if self._gathering is not None and (join_at or self._gathering.rendezvous.returned.wait(_FOLLOW_S)):
                    return self._again(None, self.rejoin_timeout_s)
                if join_at is not None and not self.leads:
                    self._listener.join_at = join_at  # for others that were started anew
                    self._first = join_at.addresses(network_id())
                    return self._again(None, self._config.connect_timeout_s)
                if refused or not self.rejoin_timeout_s or time.monotonic() + _PAUSE_S > deadline:
                    raise
                log.warning("%s Trying again.", error)
                time.sleep(_PAUSE_S)

    def formed(self, ring: Ring, rejoin_timeout_s: float) -> None:
        """`ring` is ready; whoever comes from now on is sent to rank 0, which waits for a lost rank so long."""
        self.rejoin_timeout_s = rejoin_timeout_s
        self.rank, self.world_size, self.epoch = ring.rank, ring.world_size, ring.epoch
        self._lead_newcomers(ring)
        if self._gathering is not None:
            self._gathering.growth.formed()
            if rejoin_timeout_s == 0:
                self._gathering.rendezvous.close("rank 0 takes nobody in any more; a lost rank ends its ring.")

    def spares(self) -> int:
        """How many wait at rank 0's for a place."""
        return 0 if self._gathering is None else len(self._gathering.rendezvous.waiting())

    @property
    def measured(self) -> list[MeasuredLink]:
        """The links of this ring that were measured."""
        return [] if self._gathering is None else self._gathering.measured

    def grows(self) -> bool:
        """Whether rank 0 is to end this ring for a larger one, which is the `next`."""
        return self._gathering is not None and self._gathering.grows()

    def next(self, lost: PeerError | None) -> Ring | None:
        """The ring after one that `lost` has ended, or rank 0 in order; None where this rank goes on alone. Raises
        ConnectError or AuthenticationError, and PeerLostError when rank 0 gives up."""
        return self._again(lost, self.rejoin_timeout_s)

    def _again(self, lost: PeerError | None, timeout_s: float) -> Ring | None:
        """The ring of those who meet at rank 0's within `timeout_s`."""
        assert self._listener is not None
        tries = 0
        while True:
            try:
                self._listener.gauges = self._gauges  # not beside a ring that works
                seat = self._gathered(lost, timeout_s) if self.leads else self._joined(timeout_s)
                self._listener.gauges = None
                return self._form(seat)
            except RefusedError:
                raise
            except ConnectError as error:
                tries += 1
                if tries == TRIES and self.spec.join is None:
                    raise
                log.warning("%s Trying again.", error)
                time.sleep(_PAUSE_S)

    # -- a member's ----------------------------------------------------------------------------

    def _joined(self, timeout_s: float) -> Seat:
        """Join at rank 0's, which gives this rank a place in a ring."""
        wait_s = math.inf if self.spec.join is not None else timeout_s
        had = -1 if self.spec.join is not None and not self.epoch else self.rank
        seat = join(
            self._first,
            self._config,
            self.loader.files.identity,
            self._member,
            rank=had,
            epoch=self.epoch,
            timeout_s=wait_s,
        )
        self.settings = Settings()  # rank 0 has seen what this rank was told
        log.debug("this is rank %d of %d in epoch %d", seat.rank, seat.world_size, seat.epoch)
        return seat

    def _member(self, rank: int, epoch: int, link: socket.socket) -> Member:
        return Member(rank, epoch, self._own_place(link), self.loader.capabilities(rank, self.spec.settings))

    def _own_place(self, *links: socket.socket) -> Place:
        assert self._listener is not None
        return own_place(self._config, self._listener.port, links)

    def _form(self, seat: Seat) -> Ring | None:
        self.rank, self.world_size, self.epoch = seat.rank, seat.world_size, seat.epoch
        if seat.world_size == 1:
            return None
        config = self._config.replace(
            rank=seat.rank, world_size=seat.world_size, right=seat.right[0], connect_timeout_s=FORM_S
        )
        return self._connect(config, seat.epoch, seat.right)

    def _connect(self, config: RingConfig, epoch: int = 0, right: Sequence[Address] = ()) -> Ring:
        ring = connect(
            config,
            fingerprint=self.loader.files.identity,
            heartbeat=self._heartbeat,
            listener=self._listener,
            epoch=epoch,
            right=right,
        )
        self._lead_newcomers(ring)  # a rank may be lost before all have loaded, and be started again
        return ring

    def _lead_newcomers(self, ring: Ring) -> None:
        """Keep in mind where rank 0 is, for this rank and for those that look for their place in a ring that runs."""
        if ring.first is not None and self._listener is not None:
            join_at = msgspec.structs.replace(ring.first, hosts=ring.first.hosts[:_HOSTS])
            self._listener.join_at = join_at if self.rejoin_timeout_s else None
            if self.spec.join is None:
                self._first = ring.first.addresses(network_id())

    # -- rank 0's ------------------------------------------------------------------------------

    def _gathered(self, lost: PeerError | None, timeout_s: float) -> Seat:
        """Gather the members of the next ring and give them their places."""
        assert self._gathering is not None
        seat = self._gathering.gather(lost, self._own_place, timeout_s)
        self.settings = self._gathering.settings()
        return seat

    def _returned(self) -> None:
        """A rank of an earlier ring is here: the first one of this process will not form."""
        if self._listener is not None and self._listener.door is not None and not self.epoch:
            self._listener.door.fail(ConnectError("ranks of an earlier ring have come to join."))
