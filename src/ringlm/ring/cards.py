"""What ranks tell each other of themselves while the ring forms, and where that makes them reachable.

Cards go up the chain of ranks, from 0 to the last, and all of them back down: so nothing but the links
between neighbours is needed, and those not between the last rank and the first.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec

from ringlm.errors import ConnectError
from ringlm.ring.address import Address, is_loopback
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import receive_message, send_message

_MAX_BYTES_A_RANK = 1 << 12

Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Card(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others of itself, and by which address it reached its right neighbour."""

    rank: int
    hosts: list[str]
    port: Port
    right: tuple[str, Port]
    machine: str
    network: str


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
            raise ConnectError(
                f"a neighbour of rank {self._rank} left while the ring was being formed ({error}); see its own "
                "message, and start all ranks again."
            ) from None
        return known

    def _receive(self, neighbour: Connection, count: int, kind: type[Any]) -> list[Any]:
        body = receive_message(neighbour, count * _MAX_BYTES_A_RANK, self._deadline)
        values = msgspec.msgpack.decode(body, type=list[kind])  # type: ignore[valid-type]
        if len(values) != count:
            raise ConnectError(f"{len(values)} cards came to rank {self._rank} instead of {count}.")
        return values


def reach(cards: list[Card], peer: int, rank: int) -> list[Address]:
    """Where `rank` can try to reach `peer`, the likeliest first: as its left neighbour did, then at the
    addresses of its machine; loopback, and addresses that this machine has too, only from the same one."""
    left, card, network = cards[(peer - 1) % len(cards)], cards[peer], cards[rank].network
    addresses = [Address(*left.right)] if left.network == network or not is_loopback(left.right[0]) else []
    for neighbour in (card, *cards):
        if neighbour.network == card.network:
            addresses += [
                Address(host, card.port)
                for host in neighbour.hosts
                if card.network == network or not (is_loopback(host) or host in cards[rank].hosts)
            ]
    return list(dict.fromkeys(addresses)) or [Address(*left.right)]
