"""What ranks tell each other of themselves while the ring forms, and where that makes them reachable.

Cards go up the chain of ranks, from 0 to the last, and all of them back down: so nothing but the links
between neighbours is needed, and those not between the last rank and the first.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from typing import Annotated, Any

import msgspec

from ringlm.errors import ConnectError
from ringlm.ring.address import Address, interface_address, is_loopback, local_addresses, network_id
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Place
from ringlm.ring.same_machine import own_host
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import receive_message, send_message

_MAX_BYTES_A_RANK = 1 << 12

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Card(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others of itself, and by which address it reached its right neighbour."""

    rank: int
    place: Place
    right: tuple[str, Port]
    machine: str


class Chain:
    """This rank's links to its neighbours, for what everybody tells everybody; the last has no right one."""

    def __init__(
        self, rank: int, world_size: int, left: Connection | None, right: Connection | None, deadline: float
    ) -> None:
        self._rank = rank
        self._world_size = world_size
        self._left = left
        self._right = right
        self._deadline = deadline

    def share(self, mine: Any, kind: type[Any]) -> list[Any]:
        """Everybody's `mine`, of type `kind`, by rank. Raises ConnectError."""
        try:
            known = [mine] if self._left is None else [*self._receive(self._left, self._rank, kind), mine]
            if self._right is not None:
                send_message(self._right, msgspec.msgpack.encode(known), self._deadline)
                known = self._receive(self._right, self._world_size, kind)
            if self._left is not None:
                send_message(self._left, msgspec.msgpack.encode(known), self._deadline)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConnectError(left_early(self._rank, str(error))) from None
        return known

    def _receive(self, neighbour: Connection, count: int, kind: type[Any]) -> list[Any]:
        body = receive_message(neighbour, count * _MAX_BYTES_A_RANK, self._deadline)
        values = msgspec.msgpack.decode(body, type=list[kind])  # type: ignore[valid-type]
        if len(values) != count:
            raise ConnectError(f"{len(values)} cards came to rank {self._rank} instead of {count}.")
        return values


def left_early(rank: int, why: str) -> str:
    """What to say of a neighbour of `rank` that is gone before the ring is there."""
    return (
        f"a neighbour of rank {rank} left while the ring was being formed ({why}); see its own message, and start all "
        "ranks again."
    )


def reach(cards: list[Card], peer: int, rank: int) -> list[Address]:
    """Where `rank` can try to reach `peer`, the likeliest first: as its left neighbour did, then at the
    addresses of its machine; loopback, and addresses that this machine has too, only from the same one."""
    left, card, here = cards[(peer - 1) % len(cards)], cards[peer].place, cards[rank].place
    addresses = [Address(*left.right)] if left.place.network == here.network or not is_loopback(left.right[0]) else []
    for beside in (card, *(one.place for one in cards if one.place.network == card.network)):
        found = Place(beside.hosts, card.port, card.network).addresses(here.network)
        addresses += [one for one in found if card.network == here.network or one.host not in here.hosts]
    return list(dict.fromkeys(addresses)) or [Address(*left.right)]


def reached(link: socket.socket, addresses: list[Address]) -> Address:
    """By which of its addresses a rank was reached."""
    if len(addresses) == 1:
        return addresses[0]
    if link.family == socket.AF_UNIX:
        return Address("127.0.0.1", addresses[0].port)
    return Address(*link.getpeername()[:2])


def own_place(config: RingConfig, port: int, links: Sequence[socket.socket]) -> Place:
    """Where this rank, which has these links, listens: the likeliest hosts first, loopback's last."""
    if config.interface is not None:  # and nowhere else, also where a link came by a Unix socket
        return Place([interface_address(config.interface)], port, network_id())
    hosts = {own_host(sock) for sock in links}
    if config.secret is not None:
        hosts |= set(local_addresses())
    return Place(sorted(hosts, key=lambda host: (is_loopback(host), host)), port, network_id())
