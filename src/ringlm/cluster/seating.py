"""How a rank comes by its place in one ring after the other: as it was told at the start, or as rank 0's rendezvous
decides. Forms the rings; knows no engine.
"""

from __future__ import annotations

import logging
import math
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final

import msgspec

from ringlm.cluster.agreement import check_daemon, check_memory, propose
from ringlm.cluster.joining import Assignment, Member, Offer, join
from ringlm.cluster.loading import Loader
from ringlm.cluster.messages import MeasuredLink
from ringlm.cluster.ordering import arrange
from ringlm.cluster.rendezvous import Rendezvous
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, ConnectError, PeerError, PeerLostError
from ringlm.ring import Heartbeat, Ring, RingConfig, connect
from ringlm.ring.address import Address, network_id
from ringlm.ring.forming import open_listener, own_place
from ringlm.ring.gauge import Gauges
from ringlm.ring.handshake import Place, RefusedError
from ringlm.ring.listener import Listener

GRACE_S: Final = 2.0  # for the ranks of a broken ring, before a spare takes the place of one
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
        self.world_size = self._whole = spec.world_size  # how many ranks there are to be
        self._slots = list(range(self._whole))  # by rank, its place among the weights of --split
        self._first = [] if spec.join is None else [spec.join]  # where rank 0 listens
        self._alone = self._whole == 1 and spec.join is None
        self.measured: list[MeasuredLink] = []
        self._rendezvous: Rendezvous | None = None
        self._listener: Listener | None = None
        self._gauges = Gauges()

    def __enter__(self) -> Seating:
        spec = self.spec
        if not self._alone:
            self._listener = open_listener(self._config)
            self._listener.gauges = self._gauges
            if self.leads and (spec.awaits or spec.rejoin_timeout_s > 0):
                offer = Offer(spec.asked or spec.model, self._whole)
                self._rendezvous = Rendezvous(
                    self._listener, self.loader.files.identity, offer, self._judge, self._returned
                )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close("rank 0 has ended." if error is None else f"rank 0 has ended: {error}")
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
                return connect(
                    self._config,
                    fingerprint=self.loader.files.identity,
                    heartbeat=self._heartbeat,
                    listener=self._listener,
                )
            except ConnectError as error:
                # Where ranks of an earlier ring wait, this one cannot form: they meet at rank 0's.
                refused = error if isinstance(error, RefusedError) else None
                join_at = None if refused is None else refused.join
                if self._rendezvous is not None and (join_at or self._rendezvous.returned.wait(_FOLLOW_S)):
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
        assert self._listener is not None
        self.rejoin_timeout_s = rejoin_timeout_s
        self.rank, self.world_size, self.epoch = ring.rank, ring.world_size, ring.epoch
        if rejoin_timeout_s == 0:
            if self._rendezvous is not None:
                self._rendezvous.close("rank 0 takes nobody in any more; a lost rank ends its ring.")
        elif ring.first is not None:
            self._listener.join_at = msgspec.structs.replace(ring.first, hosts=ring.first.hosts[:_HOSTS])
            if self.spec.join is None:
                self._first = ring.first.addresses(network_id())

    def spares(self) -> int:
        """How many wait at rank 0's for a place."""
        return 0 if self._rendezvous is None else self._rendezvous.count

    def next(self, lost: PeerError | None) -> Ring | None:
        """The ring after one that `lost` has ended, or rank 0 in order; None where this rank goes on alone. Raises
        ConnectError or AuthenticationError, and PeerLostError when rank 0 gives up."""
        return self._again(lost, self.rejoin_timeout_s)

    def _again(self, lost: PeerError | None, timeout_s: float) -> Ring | None:
        """The ring of those who meet at rank 0's within `timeout_s`."""
        tries = 0
        while True:
            try:
                return self._gathered(lost, timeout_s) if self.leads else self._joined(timeout_s)
            except RefusedError:
                raise
            except ConnectError as error:
                tries += 1
                if tries == TRIES and self.spec.join is None:
                    raise
                log.warning("%s Trying again.", error)
                time.sleep(_PAUSE_S)

    # -- a member's ----------------------------------------------------------------------------

    def _joined(self, timeout_s: float) -> Ring:
        """Join at rank 0's, and form the ring in which that gives this rank a place."""
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
        return self._form(seat.rank, seat.world_size, seat.epoch, seat.right)

    def _member(self, rank: int, epoch: int, link: socket.socket) -> Member:
        assert self._listener is not None
        place = own_place(self._config, self._listener.port, [link])
        return Member(rank, epoch, place, self.loader.capabilities(rank, self.spec.settings))

    def _form(self, rank: int, world_size: int, epoch: int, right: list[Address]) -> Ring:
        config = self._config.replace(rank=rank, world_size=world_size, right=right[0], connect_timeout_s=FORM_S)
        self.rank, self.world_size, self.epoch = rank, world_size, epoch
        return connect(
            config,
            fingerprint=self.loader.files.identity,
            heartbeat=self._heartbeat,
            listener=self._listener,
            epoch=epoch,
            right=right,
        )

    # -- rank 0's ------------------------------------------------------------------------------

    def _gathered(self, lost: PeerError | None, timeout_s: float) -> Ring | None:
        """Gather the members of the next ring, give them their ranks and form it."""
        assert self._rendezvous is not None
        assert self._listener is not None
        port, told = self._listener.port, -1
        expected = set() if lost is None else set(range(1, self.world_size)) - {lost.rank}

        def choose(present: list[Member], waited_s: float) -> list[Member] | None:
            here = {member.rank for member in present}
            if not expected <= here and waited_s < min(GRACE_S, timeout_s):
                return None
            if len(present) >= self._whole - 1:
                return seats(present, self._whole)
            if waited_s < timeout_s:
                nonlocal told
                if (missing := self._whole - 1 - len(present)) != told:
                    told = missing
                    self._tell(f"waiting for {missing} rank{'s' * (missing > 1)} to join at port {port}")
                return None
            self._check_fit(present, lost, timeout_s)
            return sorted(present, key=lambda member: member.rank)

        chosen, epoch = self._rendezvous.gather(choose, self.epoch, timeout_s)
        own = self._rendezvous.place(own_place(self._config, self._listener.port, []))
        chosen, self.measured = arrange(self._rendezvous, own, chosen, self._config, self.measured)
        self._slots = slots_of(chosen, self._slots, self._whole)
        self.settings = self._shared(self._slots)
        world_size = len(chosen) + 1
        if world_size == 1:
            self.rank, self.world_size, self.epoch = 0, 1, epoch
            return None
        places = [own, *(member.place for member in chosen)]
        rights = [_reachable(places[(rank + 1) % world_size], places[rank]) for rank in range(world_size)]
        for rank, member in enumerate(chosen, 1):
            self._rendezvous.seat(member, Assignment(rank, world_size, epoch, rights[rank]))
        return self._form(0, world_size, epoch, [Address(*one) for one in rights[0]])

    def _check_fit(self, members: list[Member], lost: PeerError | None, timeout_s: float) -> None:
        """Raises PeerLostError where the model does not fit rank 0 and `members`."""
        try:
            settings = self._shared(slots_of(members, self._slots, self._whole))
            ranks = [self.loader.capabilities(0, settings)]
            for rank, member in enumerate(members, 1):
                ranks.append(msgspec.structs.replace(member.capabilities, rank=rank, settings=Settings()))
            check_memory(propose(ranks, self.loader.files), ranks)
        except ConfigError as error:
            why = "Ranks are missing." if lost is None else f"{str(lost).rstrip('.')}."
            raise PeerLostError(
                f"{why} Nobody took its place within {timeout_s:g} s, and {len(members) + 1} of {self._whole} ranks "
                f"are not enough: {error}",
                -1 if lost is None else lost.rank,
            ) from None

    def _shared(self, slots: list[int]) -> Settings:
        """The settings for ranks of these slots."""
        split = self.spec.settings.split
        if split is None:
            return self.spec.settings
        return msgspec.structs.replace(self.spec.settings, split=tuple(split[slot] for slot in slots))

    def _judge(self, member: Member) -> None:
        """Raises ConfigError for who was told other settings than rank 0."""
        check_daemon(member.capabilities, self.spec.settings)

    def _returned(self) -> None:
        """A rank of an earlier ring is here: the first one of this process will not form."""
        if self._listener is not None and self._listener.door is not None and not self.epoch:
            self._listener.door.fail(ConnectError("ranks of an earlier ring have come to join."))


def seats(present: list[Member], world_size: int) -> list[Member]:
    """Who becomes rank 1, 2, …: who had that rank, the first to come of several; spares where nobody had."""
    had: dict[int, Member] = {}
    spares = []
    for member in present:
        if 0 < member.rank < world_size and member.rank not in had:
            had[member.rank] = member
        else:
            spares.append(member)
    return [had[rank] if rank in had else spares.pop(0) for rank in range(1, world_size)]


def slots_of(members: list[Member], before: list[int], whole: int) -> list[int]:
    """By the ranks that `members` will have, whose share of the model each takes: that of the rank it had, or what is
    left over."""
    slots = [0]
    known = {member.rank: before[member.rank] for member in members if 0 < member.rank < len(before)}
    left = [slot for slot in range(1, whole) if slot not in known.values()]
    for member in members:
        slot = known.pop(member.rank, None)
        slots.append(left.pop(0) if slot is None else slot)
    return slots


def _reachable(right: Place, left: Place) -> list[tuple[str, int]]:
    """Where `left` may reach `right`."""
    return [(one.host, one.port) for one in right.addresses(left.network)] or [(right.hosts[0], right.port)]
