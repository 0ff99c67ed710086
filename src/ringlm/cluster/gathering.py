"""Rank 0's choice of who is in the next ring, and with whose share of the model: who was in the last one, has joined
since, or is left. Knows no links.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Final

import msgspec

from ringlm.cluster.agreement import check_daemon, check_memory, propose
from ringlm.cluster.growth import Growth
from ringlm.cluster.joining import Assignment, End, Member, Offer, Seat
from ringlm.cluster.loading import Loader
from ringlm.cluster.memory import UnfitError
from ringlm.cluster.messages import MeasuredLink
from ringlm.cluster.ordering import arrange
from ringlm.cluster.rendezvous import Rendezvous
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, PeerError, PeerLostError
from ringlm.ring import RingConfig
from ringlm.ring.address import Address
from ringlm.ring.handshake import Place
from ringlm.ring.listener import Listener

GRACE_S: Final = 2.0  # for the ranks of a broken ring, before a spare takes the place of one
LONG_GRACE_S: Final = 15.0  # for those of one that was to grow, before it goes on without them

log = logging.getLogger("ringlm")


class Gathering:
    """From the first ring to the last, at the rendezvous on `listener`. `tell` hears for how many ranks it waits, and
    where; `on_return` is called once somebody comes who has had a rank."""

    def __init__(
        self, listener: Listener, loader: Loader, tell: Callable[[str], None], on_return: Callable[[], None]
    ) -> None:
        spec = loader.spec
        self.growth = Growth()
        self.measured: list[MeasuredLink] = []
        self._loader, self._tell, self._port = loader, tell, listener.port
        self._whole = spec.world_size  # how many ranks there are to be
        self._slots = list(range(self._whole))  # by rank of the last ring, its place among the weights of --split
        self._members: list[Member] = []  # its ranks but rank 0, where it was gathered here
        self._epoch = 0
        offer = Offer(spec.asked or spec.model, self._whole)
        self.rendezvous = Rendezvous(listener, loader.files.identity, offer, self._judge, on_return)

    def settings(self) -> Settings:
        """For the ranks of the last ring."""
        return self._shared(self._slots)

    def grows(self) -> bool:
        """Whether a ring that has lost ranks is to be ended now, since others wait with which it is larger."""
        if len(self._slots) == self._whole or not self.growth.due or not (waiting := self.rendezvous.waiting()):
            return False
        larger, begins = seats([*self._members, *waiting], self._slots, self._epoch, self._whole), False
        try:
            begins = self._fit(larger, complete=False)
        except ConfigError as error:
            log.warning("A rank that waits cannot be taken in: %s", error)
        self.growth.tried(begins)
        if begins:
            log.warning("The ring is formed again, of %d ranks in place of %d.", len(larger) + 1, len(self._slots))
        return begins

    def gather(self, lost: PeerError | None, own: Callable[[], Place], timeout_s: float) -> Seat:
        """Gather the members of the next ring within `timeout_s` and give them their ranks; the seat of rank 0, which
        listens at its `own` place. `lost` has ended the last one. Raises ConnectError, PeerLostError where those who
        are left are too few for the model, and ConfigError where all of them are."""
        # Where a ring was to grow, or has broken because it grew, nobody is awaited but those who were in the last one.
        hasty = self.growth.ended(broken=lost is not None)
        timeout_s = max(timeout_s, LONG_GRACE_S) if hasty else timeout_s
        expected = set(range(1, len(self._slots))) if hasty or lost is not None else set()
        expected.discard(-1 if lost is None else lost.rank)
        told = -1

        def choose(present: list[Member], waited_s: float) -> dict[int, Member] | None:
            all_here = expected <= {member.rank for member in present if member.epoch == self._epoch}
            if not all_here and waited_s < min(GRACE_S, timeout_s):
                return None
            seated = seats(present, self._slots, self._epoch, self._whole)
            missing = self._whole - 1 - len(seated)
            enough_s = GRACE_S if hasty and all_here else math.inf
            if not missing or waited_s >= enough_s:
                if self._fit(seated, complete=not missing):
                    return seated
            elif waited_s >= timeout_s:
                self._check_left(seated, lost, timeout_s)
                log.warning("Going on with %d of %d ranks, until others join.", len(seated) + 1, self._whole)
                return seated
            nonlocal told
            if missing and missing != told:
                told = missing
                self._tell(f"waiting for {missing} rank{'s' * (missing > 1)} to join at port {self._port}")
            return None

        seated, epoch = self.rendezvous.gather(choose, self._epoch, timeout_s)
        here, config = self.rendezvous.place(own()), self._loader.spec.ring or RingConfig()
        members, self.measured = arrange(self.rendezvous, here, list(seated.values()), config, self.measured)
        world_size = len(members) + 1
        self._slots, self._epoch = [0, *seated], epoch
        self._members = [msgspec.structs.replace(one, rank=rank, epoch=epoch) for rank, one in enumerate(members, 1)]
        places = [here, *(member.place for member in members)]
        rights = [_reachable(places[(rank + 1) % world_size], places[rank]) for rank in range(world_size)]
        for rank, member in enumerate(members, 1):
            self.rendezvous.answer(member, Assignment(rank, world_size, epoch, rights[rank]))
        return Seat(0, world_size, epoch, [Address(*one) for one in rights[0]])

    def _check_left(self, seated: dict[int, Member], lost: PeerError | None, timeout_s: float) -> None:
        """Raises PeerLostError where the model does not fit rank 0 and those who are left."""
        try:
            self._check_memory(seated)
        except ConfigError as error:
            why = "Ranks are missing." if lost is None else f"{str(lost).rstrip('.')}."
            raise PeerLostError(
                f"{why} Nobody took its place within {timeout_s:g} s, and {len(seated) + 1} of {self._whole} ranks "
                f"are not enough: {error}",
                -1 if lost is None else lost.rank,
            ) from None

    def _fit(self, seated: dict[int, Member], complete: bool) -> bool:
        """Whether the model fits into the memory of these ranks. Newcomers because of whom it does not are told so, and
        leave; where there are none, and nobody else to wait for, raises UnfitError."""
        try:
            self._check_memory(seated)
        except UnfitError as error:
            unfit = [member for rank, member in enumerate(seated.values(), 1) if rank in error.ranks]
            newcomers = [one for one in unfit if one.rank < 0 or one.epoch != self._epoch]
            if complete and not newcomers:
                raise
            for one in newcomers:
                log.warning("turned away a rank that would join: %s", error)
                self.rendezvous.answer(one, End(str(error), mistake=True))
            return False
        return True

    def _check_memory(self, seated: dict[int, Member]) -> None:
        """Raises ConfigError where rank 0 and those who are `seated` cannot be a ring, as UnfitError for memory."""
        settings = self._shared([0, *seated])
        ranks = [self._loader.capabilities(0, settings)]
        for rank, member in enumerate(seated.values(), 1):
            ranks.append(msgspec.structs.replace(member.capabilities, rank=rank, settings=Settings()))
        check_memory(propose(ranks, self._loader.files), ranks)

    def _shared(self, slots: list[int]) -> Settings:
        """The settings for ranks of these slots."""
        settings = self._loader.spec.settings
        if settings.split is None:
            return settings
        return msgspec.structs.replace(settings, split=tuple(settings.split[slot] for slot in slots))

    def _judge(self, member: Member) -> None:
        """Raises ConfigError for who was told other settings than rank 0."""
        check_daemon(member.capabilities, self._loader.spec.settings)


def seats(present: list[Member], slots: list[int], epoch: int, whole: int) -> dict[int, Member]:
    """Who takes which of the shares 1 to `whole` - 1 of the model, in their order, which will be that of the ranks: who
    was in the last ring, of `epoch`, in which rank r had share `slots[r]`, has the same again; who had a rank otherwise
    was started with it; the first to come of several; and what is left goes to whoever else is there."""
    seated: dict[int, Member] = {}
    others = []
    for member in sorted(present, key=lambda one: one.epoch != epoch):
        known = member.epoch == epoch and 0 <= member.rank < len(slots)
        slot = slots[member.rank] if known else member.rank
        if 0 < slot < whole and slot not in seated:
            seated[slot] = member
        else:
            others.append(member)
    free = [slot for slot in range(1, whole) if slot not in seated]
    return dict(sorted([*seated.items(), *zip(free, others, strict=False)]))


def _reachable(right: Place, left: Place) -> list[tuple[str, int]]:
    """Where `left` may reach `right`."""
    return [(one.host, one.port) for one in right.addresses(left.network)] or [(right.hosts[0], right.port)]
