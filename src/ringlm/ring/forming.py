"""From a RingConfig to a connected Ring: neighbours first, then everybody.

1. Listen. 2. Dial the right neighbour and await the left one. 3. Tell everybody by whom each can be
reached, and on which machine it runs. 4. Open a data link between every pair and a control link from
every rank to rank 0; where no way leads straight there, by way of the ranks between. So two terminals
need no master port, and machines in a chain of cables need no other network. Without RING_RIGHT the
neighbour's address comes from a torch TCPStore at the master, as torchrun runs one.
"""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from collections.abc import Callable
from functools import partial

import msgspec

from ringlm.errors import AuthenticationError, ConfigError, ConnectError, RingError
from ringlm.ring.address import (
    Address,
    interface_address,
    is_loopback,
    local_addresses,
    machine_id,
    network_id,
)
from ringlm.ring.algorithms import Limits
from ringlm.ring.cards import Card, Chain, Port, reach
from ringlm.ring.config import RingConfig
from ringlm.ring.control import ControlPlane, Heartbeat
from ringlm.ring.handshake import Handshake, Hello, RefusedError, Terms, differing, initiate
from ringlm.ring.link import Link
from ringlm.ring.listener import Listener
from ringlm.ring.relay import Relays
from ringlm.ring.ring import SEGMENT_BYTES, Ring
from ringlm.ring.same_machine import own_host
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import dial, listen, spoken, tune

_LINGER_S = 1.5  # longer than a dialler pauses
_PATIENCE_S = 0.5  # for the first link of the last rank, once everybody is here
_TRIES = 2  # to reach a rank that is known to listen, before other ranks are asked to lead there


def connect(
    config: RingConfig,
    *,
    fingerprint: str = "",
    heartbeat: Heartbeat | None = None,
    segment_bytes: int = SEGMENT_BYTES,
    direct_bytes: int = Limits().direct,
) -> Ring:
    """Form the ring that `config` describes; returns once this rank has all its links.

    Ranks refuse each other whose non-empty `fingerprint`, "label:field=value,field=value", differ in a field. With a
    `heartbeat` collectives have no deadline of their own and fail when a peer does; without one they fail after
    `config.timeout_s`.
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
        self.cards: list[Card] = []
        self.informed = threading.Event()  # the cards are here
        self.relayed: set[int] = set()  # ranks that this one reached by way of others
        self.relays = Relays()
        self.listener = Listener(sockets, config.rank, Terms(config.secret, config.seal), self._admit, self._relay)

    def run(self, heartbeat: Heartbeat | None, segment_bytes: int, direct_bytes: int) -> Ring:
        config = self.config
        rank, world_size, last = config.rank, config.world_size, config.world_size - 1
        address = config.right or self._from_store()
        # The last rank's right neighbour may be out of reach, so it is dialled in the background.
        first_try = None
        if rank == last:
            first_try = _InBackground(partial(self._dial, "ring", 0, [address]), self.listener.fail)
        right = None if rank == last else self._dial("ring", rank + 1, [address])
        left = self._take("ring", rank - 1) if rank > 0 else None
        while left is not None and rank == last and not spoken(left.sock, self.deadline):
            left = self._take("ring", rank - 1)  # it was ended before all were here, and may be started again
        chain = Chain(rank, world_size, left, right, self.deadline)
        cards = self.cards = chain.share(self._card(left, right, address), Card)
        if [card.rank for card in cards] != list(range(world_size)):
            raise ConnectError(f"the ring is not one ring of {world_size} ranks; check every RING_RIGHT.")
        self.informed.set()

        links = {peer: found for peer, found in ((rank - 1, left), (rank + 1, right)) if found is not None}
        control: dict[int, Connection] = {}
        if rank != 0:
            control[0] = self._open("control", 0)
        if first_try is not None:
            around = first_try.result(_PATIENCE_S)
            if world_size > 2:
                links[0] = around or self._open("ring", 0)
            elif around is not None:
                around.sock.close()  # the link that rank 0 dialled carries the data
        for peer in range(rank + 2, world_size):
            if (rank, peer) != (0, last):
                links[peer] = self._open("mesh", peer)
        for peer in range(rank - 1):
            if peer not in links:
                links[peer] = self._take("mesh", peer)
        if rank == 0 and world_size > 2:
            links[last] = self._take("ring", last)
        if rank == 0:
            control = {peer: self._take("control", peer) for peer in range(1, world_size)}
        # Who was reached by way of others, as both ends must know; and nobody begins before all are here.
        detours = chain.share(sorted(self.relayed), list[int])
        pairs = {(min(one, other), max(one, other)) for one, others in enumerate(detours) for other in others}
        if pairs:  # a failure must reach everybody, whichever cable it takes away
            if rank > 1:
                control[rank - 1] = self._open("control", rank - 1)
            if 0 < rank < last:
                control[rank + 1] = self._take("control", rank + 1)
        self.listener.complete = True
        return self._ring(links, control, pairs, heartbeat, segment_bytes, direct_bytes)

    def _ring(
        self,
        links: dict[int, Connection],
        control: dict[int, Connection],
        relayed: set[tuple[int, int]],
        heartbeat: Heartbeat | None,
        segment_bytes: int,
        direct_bytes: int,
    ) -> Ring:
        config, cards, rank = self.config, self.cards, self.config.rank
        names = [f"rank {card.rank} ({reach(cards, card.rank, rank)[0]})" for card in cards]
        beat = heartbeat or Heartbeat(silence_s=math.inf)
        for sock, _ in links.values():
            tune(sock)  # the cards have left them with timeouts
        far = {other for pair in relayed if rank in pair for other in pair}
        return Ring(
            rank,
            config.world_size,
            [Link(connection, peer, names[peer]) for peer, connection in links.items()],
            control=ControlPlane(rank, control, names, beat, self.deadline - time.monotonic(), far),
            listener=self.listener,
            relays=self.relays,
            timeout_s=config.timeout_s if heartbeat is None else math.inf,
            here=[card.rank for card in cards if card.machine == cards[rank].machine],
            relayed=relayed,
            segment_bytes=segment_bytes,
            limits=Limits(direct_bytes, segment_bytes),
        )

    def discard(self) -> None:
        """Close everything: the ring will not be formed."""
        self.listener.close()
        for sock in self.opened:
            sock.close()
        self.relays.close()

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
        onward = hello.purpose == "relay" and 0 <= hello.beyond < config.world_size and hello.beyond != config.rank
        if hello.purpose not in ("ring", "mesh", "control") and not onward:
            raise RefusedError(f"links for {hello.purpose!r} are not known here.")
        if hello.purpose == "ring" and hello.rank != (config.rank - 1) % config.world_size:
            raise RefusedError(f"rank {hello.rank} is not the left neighbour of rank {config.rank}; check RING_RIGHT.")
        if hello.epoch != 0:
            raise RefusedError(f"rank {hello.rank} is in epoch {hello.epoch}, this ring in epoch 0.")
        if hello.fingerprint and self.fingerprint and (fields := differing(hello.fingerprint, self.fingerprint)):
            theirs, ours = (text.rpartition(":")[0] for text in (hello.fingerprint, self.fingerprint))
            raise RefusedError(
                f"rank {hello.rank} has the model {theirs} and rank {config.rank} {ours}, whose {' and '.join(fields)} "
                "differ; every rank needs the same model, under any name: copy its files, or mend -m or --adapter."
            )

    def _hello(self, purpose: str, to: int, beyond: int = -1) -> Hello:
        config = self.config
        return Hello(purpose, config.rank, to, config.world_size, 0, self.fingerprint, beyond, config.seal)

    def _dial(
        self,
        purpose: str,
        peer: int,
        addresses: list[Address],
        tries: int | None = None,
        unwanted: threading.Event | None = None,
    ) -> Connection:
        return self._say((self._hello(purpose, peer),), peer, addresses, tries, unwanted)

    def _say(
        self,
        hellos: tuple[Hello, ...],
        peer: int,
        addresses: list[Address],
        tries: int | None = None,
        unwanted: threading.Event | None = None,
    ) -> Connection:
        """Dial a rank and make these handshakes, one after the other; the last one's seal."""
        config = self.config

        def handshake(name: str, far: bool) -> Handshake:
            agreed = None
            for hello in hellos:
                far = far or len(hellos) > 1  # by way of other ranks, which could read it
                agreed = yield from initiate(msgspec.structs.replace(hello, far=far), config.secret, name)
            return agreed

        source = interface_address(config.interface) if config.interface else None
        found = dial(addresses, handshake, f"rank {peer}", self.deadline, source=source, tries=tries, unwanted=unwanted)
        self.opened.append(found.sock)
        return found

    def _open(self, purpose: str, peer: int) -> Connection:
        """A link to a rank that listens: straight there, or by way of the ranks between."""
        rank = self.config.rank
        try:
            return self._dial(purpose, peer, reach(self.cards, peer, rank), _TRIES)
        except ConnectError:
            if abs(peer - rank) == 1:
                raise
        self.relayed.add(peer)
        hop = rank + 1 if peer > rank else rank - 1
        return self._say(
            (self._hello("relay", hop, peer), self._hello(purpose, peer)), peer, reach(self.cards, hop, rank)
        )

    def _relay(self, sock: socket.socket, beyond: int) -> None:
        """A rank asks this one for a link to rank `beyond`."""
        rank = self.config.rank
        hop = rank + 1 if beyond > rank else rank - 1

        def onward() -> socket.socket:
            if not self.informed.wait(max(0.0, self.deadline - time.monotonic())):
                raise ConnectError(f"rank {rank} does not know yet where rank {beyond} is.")
            addresses = reach(self.cards, hop, rank)
            hellos = (self._hello("relay", hop, beyond),) if hop != beyond else ()
            return self._say(hellos, hop, addresses, _TRIES).sock

        self.relays.open(sock, onward)

    def _take(self, purpose: str, peer: int) -> Connection:
        found = self.listener.take(purpose, peer, self.deadline)
        self.opened.append(found.sock)
        return found

    def _card(self, left: Connection | None, right: Connection | None, address: Address) -> Card:
        config = self.config
        hosts = {own_host(connection.sock) for connection in (left, right) if connection is not None}
        if config.interface is None and config.secret is not None:
            hosts |= set(local_addresses())
        return Card(
            config.rank,
            sorted(hosts, key=lambda host: (is_loopback(host), host)),
            self.listener.port,
            (address.host, address.port),
            machine_id(),
            network_id(),
        )

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
            host, port = msgspec.json.decode(store.get(f"{ring}/{right}"), type=tuple[str, Port])
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


class _InBackground:
    """A link that is dialled on a thread of its own; `failed` is told why, if others wait in vain then."""

    def __init__(self, dial: Callable[..., Connection], failed: Callable[[RingError], None]) -> None:
        self._dial = dial
        self._failed = failed
        self._found: Connection | None = None
        self._unwanted = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="ringlm-dial", daemon=True)
        self._thread.start()

    def result(self, patience_s: float) -> Connection | None:
        """The link, or None if it is not there after `patience_s`; then it is wanted no more."""
        self._thread.join(patience_s)
        with self._lock:
            self._unwanted.set()
            return self._found

    def _run(self) -> None:
        try:
            found = self._dial(unwanted=self._unwanted)
        except RingError as error:
            if not self._unwanted.is_set():
                self._failed(error)
            return
        with self._lock:
            if self._unwanted.is_set():
                found.sock.close()
            else:
                self._found = found
