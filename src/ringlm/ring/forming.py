"""From a RingConfig to a connected Ring: neighbours first, then everybody.

1. Listen. 2. Dial the right neighbour and await the left one. 3. Tell everybody by whom each can be
reached, and on which machine it runs. 4. Open a data link between every pair and a control link from
every rank to rank 0; where no way leads straight there, by way of the ranks between. So two terminals
need no master port, and machines in a chain of cables need no other network. Without RING_RIGHT the
neighbour's address comes from a store at the master (`store`). Who dials how `dialling` knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from ringlm.errors import AuthenticationError, ConnectError
from ringlm.ring.address import Address, machine_id
from ringlm.ring.algorithms import Limits
from ringlm.ring.cards import Card, Chain, own_place, reach, reached
from ringlm.ring.config import RingConfig
from ringlm.ring.control import ControlPlane, Heartbeat
from ringlm.ring.dialling import InBackground, Opening
from ringlm.ring.handshake import RefusedError
from ringlm.ring.link import Link
from ringlm.ring.listener import Listener, open_listener
from ringlm.ring.ring import SEGMENT_BYTES, Ring
from ringlm.ring.seal import Connection
from ringlm.ring.shared import open_areas
from ringlm.ring.sockets import spoken, tune

_LINGER_S = 1.5  # longer than a dialler pauses
_PATIENCE_S = 0.5  # for the first link of the last rank, once everybody is here


def connect(
    config: RingConfig,
    *,
    fingerprint: str = "",
    heartbeat: Heartbeat | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    direct_bytes: int = Limits().direct,
    listener: Listener | None = None,
    epoch: int = 0,
    right: Sequence[Address] = (),
) -> Ring:
    """Form the ring that `config` describes; returns once this rank has all its links.

    Ranks refuse each other whose non-empty `fingerprint`, "label:field=value,field=value", differ in a field. With a
    `heartbeat` collectives have no deadline of their own and fail when a peer does; without one they fail after
    `config.timeout_s`.
    `segment_bytes` (a multiple of 16) and `direct_bytes` are the same on every rank. A `listener` is its caller's, and
    outlives the ring; rings that follow each other on it have `epoch`s that grow, and ranks of unequal ones refuse each
    other. `right` are addresses of the right neighbour, in place of `config`'s. Raises ConfigError, ConnectError or
    AuthenticationError.
    """
    if config.world_size == 1:
        return Ring(0, 1, [])
    own = None if listener is not None else open_listener(config)
    opening = Opening(config, fingerprint, listener or own, epoch)  # type: ignore[arg-type]
    try:
        formed = _form(opening, list(right))
        return _ring(opening, formed, heartbeat, own, segment_bytes, direct_bytes)
    except BaseException as error:
        # What a thread has met ends the links of this one, and is the better account.
        cause = opening.admission.failure if isinstance(error, ConnectError) else None
        try:
            told = cause or error
            if isinstance(told, AuthenticationError | RefusedError) and getattr(told, "join", None) is None:
                time.sleep(_LINGER_S)  # who dials this rank next learns why, instead of dialling a closed port
        finally:
            opening.discard()
            if own is not None:
                own.close()
        if cause is not None:
            raise cause from error
        raise


class _Formed(NamedTuple):
    """Everybody's cards, this rank's links by peer, and the pairs of ranks that reach each other by way of others."""

    cards: list[Card]
    links: dict[int, Connection]
    control: dict[int, Connection]
    relayed: set[tuple[int, int]]


def _form(opening: Opening, right_at: list[Address]) -> _Formed:
    """All links of this rank, whose right neighbour listens at one of `right_at`, if that is known."""
    config, deadline = opening.config, opening.deadline
    rank, world_size, last = config.rank, config.world_size, config.world_size - 1
    if not right_at:
        right_at = [config.right or _from_store(opening)]
    # The last rank's right neighbour may be out of reach, so it is dialled in the background.
    right = first_try = None
    to_right = partial(opening.dial, (rank + 1) % world_size, right_at, opening.hello("ring", (rank + 1) % world_size))
    if rank == last:
        first_try = InBackground(to_right, opening.admission.fail)
    else:
        right = to_right()
    left = opening.take("ring", rank - 1, right) if rank > 0 else None
    while left is not None and rank == last and not spoken(left.sock, deadline):
        left = opening.take("ring", rank - 1)  # it was ended before all were here, and may be started again

    chain = Chain(rank, world_size, left, right, deadline)
    cards = chain.share(_card(opening, left, right, right_at), Card)
    if [card.rank for card in cards] != list(range(world_size)):
        raise ConnectError(f"the ring is not one ring of {world_size} ranks; check every RING_RIGHT.")
    opening.inform(cards)
    links = {peer: found for peer, found in ((rank - 1, left), (rank + 1, right)) if found is not None}
    control: dict[int, Connection] = {}
    if rank != 0:
        control[0] = opening.open("control", 0)
    if first_try is not None:
        around = first_try.result(_PATIENCE_S)
        if world_size > 2:
            links[0] = around or opening.open("ring", 0)
        elif around is not None:
            around.sock.close()  # the link that rank 0 dialled carries the data
    for peer in range(rank + 2, world_size):
        if (rank, peer) != (0, last):
            links[peer] = opening.open("mesh", peer)
    for peer in range(rank - 1):
        if peer not in links:
            links[peer] = opening.take("mesh", peer)
    if rank == 0 and world_size > 2:
        links[last] = opening.take("ring", last)
    if rank == 0:
        control = {peer: opening.take("control", peer) for peer in range(1, world_size)}

    # Who was reached by way of others, as both ends must know; and nobody begins before all are here.
    detours = chain.share(sorted(opening.relayed), list[int])
    relayed = {(min(one, other), max(one, other)) for one, others in enumerate(detours) for other in others}
    if relayed:  # a failure must reach everybody, whichever cable it takes away
        if rank > 1:
            control[rank - 1] = opening.open("control", rank - 1)
        if 0 < rank < last:
            control[rank + 1] = opening.take("control", rank + 1)
    opening.admission.complete = True
    return _Formed(cards, links, control, relayed)


def _ring(
    opening: Opening,
    formed: _Formed,
    heartbeat: Heartbeat | None,
    own: Listener | None,
    segment_bytes: int,
    direct_bytes: int,
) -> Ring:
    config, rank = opening.config, opening.config.rank
    cards, links, control, relayed = formed
    names = [f"rank {card.rank} ({reach(cards, card.rank, rank)[0]})" for card in cards]
    beat = heartbeat or Heartbeat(silence_s=math.inf)
    far = {other for pair in relayed if rank in pair for other in pair}
    areas = open_areas(rank, links, far, segment_bytes, opening.deadline)
    for sock, _ in links.values():
        tune(sock)  # the cards have left them with timeouts
    return Ring(
        rank,
        config.world_size,
        [Link(connection, peer, names[peer], areas.get(peer)) for peer, connection in links.items()],
        control=ControlPlane(rank, control, names, beat, opening.deadline - time.monotonic(), far),
        door=opening.admission,
        listener=own,
        relays=opening.relays,
        timeout_s=config.timeout_s if heartbeat is None else math.inf,
        here=[card.rank for card in cards if card.machine == cards[rank].machine],
        first=cards[0].place,
        relayed=relayed,
        epoch=opening.epoch,
        segment_bytes=segment_bytes,
        limits=Limits(direct_bytes, segment_bytes),
    )


def _card(opening: Opening, left: Connection | None, right: Connection | None, right_at: list[Address]) -> Card:
    place = own_place(opening.config, opening.port, [found.sock for found in (left, right) if found is not None])
    there = right_at[0] if right is None else reached(right.sock, right_at)
    return Card(opening.config.rank, place, there, machine_id())


def _from_store(opening: Opening) -> Address:
    from ringlm.ring.store import right_by_store  # with it comes torch.distributed

    return right_by_store(opening.config, opening.port, opening.deadline)
