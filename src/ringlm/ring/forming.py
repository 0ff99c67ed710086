"""From a RingConfig to a connected Ring: neighbours first, then everybody.

1. Listen. 2. Dial the right neighbour and await the left one. 3. Pass everybody's card (where it can be
reached, on which machine it runs) once round. 4. Open a data link between every pair, the lower rank
dialling, and a control link from every rank to rank 0. So two terminals need no master port. Without
RING_RIGHT the neighbour's address comes from a torch TCPStore at the master, as torchrun runs one.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from typing import Annotated

import msgspec

from ringlm.errors import AuthenticationError, ConfigError, ConnectError
from ringlm.ring.address import Address, core_count, is_loopback, machine_id, network_id
from ringlm.ring.algorithms import Limits
from ringlm.ring.config import RingConfig
from ringlm.ring.control import ControlPlane, Heartbeat
from ringlm.ring.handshake import Handshake, Hello, RefusedError, initiate
from ringlm.ring.link import Link
from ringlm.ring.listener import Listener
from ringlm.ring.ring import SEGMENT_BYTES, Ring
from ringlm.ring.sockets import dial, listen, receive_exactly, send_all, tune

_MAX_CARD_BYTES = 1 << 12
_LINGER_S = 1.5  # longer than a dialler pauses

_Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Card(msgspec.Struct, frozen=True, array_like=True):
    """What a rank tells the others of itself, and by which address it reached its right neighbour."""

    rank: int
    hosts: list[str]
    port: _Port
    right: tuple[str, _Port]
    machine: str
    network: str
    cores: int


def connect(
    config: RingConfig,
    *,
    fingerprint: str = "",
    heartbeat: Heartbeat | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    direct_bytes: int = Limits().direct,
) -> Ring:
    """Form the ring that `config` describes; returns once this rank has all its links.

    Ranks whose non-empty `fingerprint` differ refuse each other. With a `heartbeat` collectives have no
    deadline of their own and fail when a peer does; without one they fail after `config.timeout_s`.
    `segment_bytes` (a multiple of 16) and `direct_bytes` are the same on every rank. Raises ConfigError,
    ConnectError or AuthenticationError.
    """
    if config.world_size == 1:
        return Ring(0, 1, [])
    sockets = listen(config.port, beyond_loopback=config.secret is not None, interface=config.interface)
    forming = _Forming(config, fingerprint, sockets)
    try:
        return forming.run(heartbeat, segment_bytes, direct_bytes)
    except BaseException as error:
        try:
            if isinstance(error, AuthenticationError | RefusedError):
                time.sleep(_LINGER_S)  # who dials this rank next learns why, instead of dialling a closed port
        finally:
            forming.discard()
        raise


class _Forming:
    """The links of a ring that is not complete yet."""

    def __init__(self, config: RingConfig, fingerprint: str, sockets: list[socket.socket]) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self.deadline = time.monotonic() + config.connect_timeout_s
        self.opened: list[socket.socket] = []
        self.listener = Listener(sockets, config.rank, config.secret, self._admit)

    def run(self, heartbeat: Heartbeat | None, segment_bytes: int, direct_bytes: int) -> Ring:
        config = self.config
        rank, world_size = config.rank, config.world_size
        right_rank, left_rank = (rank + 1) % world_size, (rank - 1) % world_size
        address = config.right or self._from_store()
        right = self._dial("ring", right_rank, [address])
        left = self._take("ring", left_rank)
        cards = self._circulate(right, left, address)
        names = [f"rank {card.rank} ({_reach(cards, card.rank, rank)[0]})" for card in cards]

        links: dict[int, socket.socket] = {}
        if world_size > 2:
            links = {right_rank: right, left_rank: left}
        else:  # both neighbours are the other rank: the link that rank 0 dialled carries the data
            links = {right_rank: right if rank == 0 else left}
            (left if rank == 0 else right).close()
        control: dict[int, socket.socket] = {}
        if rank != 0:
            control[0] = self._dial("control", 0, _reach(cards, 0, rank))
        for peer in range(world_size):
            if peer not in links and peer > rank:
                links[peer] = self._dial("mesh", peer, _reach(cards, peer, rank))
        for peer in range(world_size):
            if peer not in links and peer < rank:
                links[peer] = self._take("mesh", peer)
        if rank == 0:
            control = {peer: self._take("control", peer) for peer in range(1, world_size)}
        self.listener.complete = True

        machines = Counter(card.machine for card in cards)
        beat = heartbeat or Heartbeat(silence_s=math.inf)
        patience_s = self.deadline - time.monotonic()
        return Ring(
            rank,
            world_size,
            [Link(sock, peer, names[peer]) for peer, sock in links.items()],
            control=ControlPlane(rank, control, names, beat, patience_s),
            listener=self.listener,
            timeout_s=config.timeout_s if heartbeat is None else math.inf,
            machine_ranks=machines[cards[rank].machine],
            crowded=any(machines[card.machine] > card.cores for card in cards),
            segment_bytes=segment_bytes,
            limits=Limits(direct_bytes, segment_bytes, direct_bytes),
        )

    def discard(self) -> None:
        """Close everything: the ring will not be formed."""
        self.listener.close()
        for sock in self.opened:
            sock.close()

    def _admit(self, hello: Hello) -> None:
        """Refuse a dialler that does not belong in this ring."""
        config = self.config
        if hello.world_size != config.world_size:
            raise RefusedError(
                f"rank {hello.rank} was started with world size {hello.world_size}, "
                f"rank {config.rank} with {config.world_size}."
            )
        if hello.to != config.rank:
            raise RefusedError(
                f"rank {hello.rank} looked for rank {hello.to}, but this port is rank {config.rank}'s; "
                "check the ports and the rank numbers."
            )
        if not 0 <= hello.rank < config.world_size or hello.rank == config.rank:
            raise RefusedError(f"this port is rank {hello.rank}'s; give every rank a number of its own.")
        if hello.purpose not in ("ring", "mesh", "control"):
            raise RefusedError(f"links for {hello.purpose!r} are not known here.")
        if hello.purpose == "ring" and hello.rank != (config.rank - 1) % config.world_size:
            raise RefusedError(f"rank {hello.rank} is not the left neighbour of rank {config.rank}; check RING_RIGHT.")
        if hello.epoch != 0:
            raise RefusedError(f"rank {hello.rank} is in epoch {hello.epoch}, this ring in epoch 0.")
        if hello.fingerprint and self.fingerprint and hello.fingerprint != self.fingerprint:
            raise RefusedError(
                f"rank {hello.rank} has the model {hello.fingerprint}, rank {config.rank} has {self.fingerprint}; "
                "every rank needs the same model."
            )

    def _dial(self, purpose: str, peer: int, addresses: list[Address]) -> socket.socket:
        config = self.config
        hello = Hello(purpose, config.rank, peer, config.world_size, 0, self.fingerprint)

        def handshake(name: str) -> Handshake:
            return initiate(hello, config.secret, name)

        sock = dial(addresses, handshake, f"rank {peer}", self.deadline)
        self.opened.append(sock)
        return sock

    def _take(self, purpose: str, peer: int) -> socket.socket:
        sock = self.listener.take(purpose, peer, self.deadline)
        self.opened.append(sock)
        return sock

    def _circulate(self, right: socket.socket, left: socket.socket, right_address: Address) -> list[Card]:
        """Everybody's card, by passing what is known to the right world size - 1 times."""
        rank, world_size = self.config.rank, self.config.world_size
        hosts = sorted({str(sock.getsockname()[0]) for sock in (right, left)}, key=is_loopback)
        mine = Card(
            rank,
            hosts,
            self.listener.port,
            (right_address.host, right_address.port),
            machine_id(),
            network_id(),
            core_count(),
        )
        cards = {rank: mine}
        latest = mine
        try:
            for _ in range(world_size - 1):
                body = msgspec.msgpack.encode(latest)
                send_all(right, len(body).to_bytes(2, "little") + body, self.deadline)
                length = int.from_bytes(receive_exactly(left, 2, self.deadline), "little")
                if length > _MAX_CARD_BYTES:
                    raise ConnectError(f"the left neighbour of rank {rank} announced a card of {length:,} bytes.")
                latest = msgspec.msgpack.decode(receive_exactly(left, length, self.deadline), type=Card)
                cards[latest.rank] = latest
            for sock in (right, left):
                tune(sock)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise ConnectError(
                f"a neighbour of rank {rank} left while the ring was being formed ({error}); see its own message, "
                "and start all ranks again."
            ) from None
        if sorted(cards) != list(range(world_size)):
            raise ConnectError(f"the ring is not one ring of {world_size} ranks; check every RING_RIGHT.")
        return [cards[r] for r in range(world_size)]

    def _from_store(self) -> Address:
        """The right neighbour's listening address, by way of a TCPStore at the master."""
        from datetime import timedelta

        import torch.distributed as dist

        config = self.config
        master = config.master
        assert master is not None  # RingConfig has checked it
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's agent runs the store
        run = os.environ.get("TORCHELASTIC_RUN_ID", "") + "/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        right = (config.rank + 1) % config.world_size
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                master.host,
                master.port,
                is_master=config.rank == 0 and not hosted,
                timeout=timedelta(seconds=config.connect_timeout_s),
                wait_for_workers=False,
            )
            # torchrun's store outlives a ring: the addresses of the next one have other names.
            ring = f"ringlm/{run}/{store.add(f'ringlm/{run}/rings of {config.rank}', 1)}"
            own = Address(_local_host(master), self.listener.port)
            store.set(f"{ring}/{config.rank}", msgspec.json.encode(own).decode())
            host, port = msgspec.json.decode(store.get(f"{ring}/{right}"), type=tuple[str, _Port])
            # The store's owner must not close it before everybody has read.
            store.add(f"{ring}/done", 1)
            while config.rank == 0 and not hosted and store.add(f"{ring}/done", 0) < config.world_size:
                if time.monotonic() > self.deadline:
                    raise ConnectError(f"not all of {config.world_size} ranks came to the master at {master} in time.")
                time.sleep(0.05)
        except (RuntimeError, OSError, msgspec.MsgspecError) as error:  # torch's DistError is a RuntimeError
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ConnectError(f"rank {config.rank} found no rendezvous at the master {master}: {reason}.") from None
        if config.secret is None and not is_loopback(host):
            raise ConfigError(f"rank {right} is at {host}; links beyond loopback need a shared RING_SECRET.")
        return Address(host, port)


def _local_host(master: Address) -> str:
    """The address of this machine from which the master is reached."""
    family = socket.getaddrinfo(master.host, master.port, type=socket.SOCK_DGRAM)[0][0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting UDP sends nothing
        probe.connect(tuple(master))
        return str(probe.getsockname()[0])


def _reach(cards: list[Card], peer: int, rank: int) -> list[Address]:
    """Where `rank` can try to reach `peer`, the likeliest first: as its left neighbour did, then at the
    addresses of its machine; loopback only from the same one."""
    left, card, network = cards[(peer - 1) % len(cards)], cards[peer], cards[rank].network
    addresses = [Address(*left.right)] if left.network == network or not is_loopback(left.right[0]) else []
    for neighbour in (card, *cards):
        if neighbour.network == card.network:
            addresses += [
                Address(host, card.port) for host in neighbour.hosts if card.network == network or not is_loopback(host)
            ]
    return list(dict.fromkeys(addresses)) or [Address(*left.right)]
