"""From a RingConfig to a connected Ring: neighbours first, then everybody.

1. Listen. 2. Dial the right neighbour and await the left one. 3. Tell everybody by whom each can be
reached, and on which machine it runs. 4. Open a data link between every pair and a control link from
every rank to rank 0; where no way leads straight there, by way of the ranks between. So two terminals
need no master port, and machines in a chain of cables need no other network. Without RING_RIGHT the
neighbour's address comes from a torch TCPStore at the master, as torchrun runs one.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import msgspec

from ringlm.errors import AuthenticationError, ConfigError, ConnectError, RingError
from ringlm.ring.address import (
    Address,
    address_towards,
    interface_address,
    is_loopback,
    machine_id,
)
from ringlm.ring.admission import Admission
from ringlm.ring.algorithms import Limits
from ringlm.ring.cards import Card, Chain, Port, own_place, reach, reached
from ringlm.ring.config import RingConfig
from ringlm.ring.control import ControlPlane, Heartbeat
from ringlm.ring.handshake import Handshake, Hello, RefusedError, initiate
from ringlm.ring.link import Link
from ringlm.ring.listener import Listener, open_listener
from ringlm.ring.relay import Relays
from ringlm.ring.ring import SEGMENT_BYTES, Ring
from ringlm.ring.seal import Connection
from ringlm.ring.shared import open_areas
from ringlm.ring.sockets import dial, spoken, tune

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
    forming = _Forming(config, fingerprint, listener or own, epoch, right)  # type: ignore[arg-type]
    try:
        return forming.run(heartbeat, segment_bytes, direct_bytes, own)
    except BaseException as error:
        # What a thread has met ends the links of this one, and is the better account.
        cause = forming.admission.failure if isinstance(error, ConnectError) else None
        try:
            told = cause or error
            if isinstance(told, AuthenticationError | RefusedError) and getattr(told, "join", None) is None:
                time.sleep(_LINGER_S)  # who dials this rank next learns why, instead of dialling a closed port
        finally:
            forming.discard()
            if own is not None:
                own.close()
        if cause is not None:
            raise cause from error
        raise


class _Forming:
    """The links of a ring that is not complete yet."""

    def __init__(
        self, config: RingConfig, fingerprint: str, listener: Listener, epoch: int, right: Sequence[Address]
    ) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self.epoch = epoch
        self.right = list(right)
        self.deadline = time.monotonic() + config.connect_timeout_s
        self.opened: list[socket.socket] = []
        self.cards: list[Card] = []
        self.informed = threading.Event()  # the cards are here
        self.relayed: set[int] = set()  # ranks that this one reached by way of others
        self.relays = Relays()
        self.port = listener.port
        self.admission = Admission(config, epoch, fingerprint, listener.port, self._relay, self._shut)
        listener.door = self.admission

    def run(self, heartbeat: Heartbeat | None, segment_bytes: int, direct_bytes: int, own: Listener | None) -> Ring:
        config = self.config
        rank, world_size, last = config.rank, config.world_size, config.world_size - 1
        right_at = self.right or [config.right or self._from_store()]
        # The last rank's right neighbour may be out of reach, so it is dialled in the background.
        first_try = None
        if rank == last:
            first_try = _InBackground(partial(self._dial, "ring", 0, right_at), self.admission.fail)
        right = None if rank == last else self._dial("ring", rank + 1, right_at)
        left = self._take("ring", rank - 1, right) if rank > 0 else None
        while left is not None and rank == last and not spoken(left.sock, self.deadline):
            left = self._take("ring", rank - 1)  # it was ended before all were here, and may be started again
        chain = Chain(rank, world_size, left, right, self.deadline)
        cards = self.cards = chain.share(self._card(left, right, right_at), Card)
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
        self.admission.complete = True
        return self._ring(links, control, pairs, heartbeat, segment_bytes, direct_bytes, own)

    def _ring(
        self,
        links: dict[int, Connection],
        control: dict[int, Connection],
        relayed: set[tuple[int, int]],
        heartbeat: Heartbeat | None,
        segment_bytes: int,
        direct_bytes: int,
        own: Listener | None,
    ) -> Ring:
        config, cards, rank = self.config, self.cards, self.config.rank
        names = [f"rank {card.rank} ({reach(cards, card.rank, rank)[0]})" for card in cards]
        beat = heartbeat or Heartbeat(silence_s=math.inf)
        far = {other for pair in relayed if rank in pair for other in pair}
        areas = open_areas(rank, links, far, segment_bytes, self.deadline)
        for sock, _ in links.values():
            tune(sock)  # the cards have left them with timeouts
        return Ring(
            rank,
            config.world_size,
            [Link(connection, peer, names[peer], areas.get(peer)) for peer, connection in links.items()],
            control=ControlPlane(rank, control, names, beat, self.deadline - time.monotonic(), far),
            door=self.admission,
            listener=own,
            relays=self.relays,
            timeout_s=config.timeout_s if heartbeat is None else math.inf,
            here=[card.rank for card in cards if card.machine == cards[rank].machine],
            first=cards[0].place,
            relayed=relayed,
            epoch=self.epoch,
            segment_bytes=segment_bytes,
            limits=Limits(direct_bytes, segment_bytes),
        )

    def _shut(self) -> None:
        """Wake whoever waits on a link that is open already."""
        for sock in list(self.opened):
            with contextlib.suppress(OSError):  # its peer was first
                sock.shutdown(socket.SHUT_RDWR)

    def discard(self) -> None:
        """Close everything: the ring will not be formed."""
        self.admission.close()
        for sock in self.opened:
            sock.close()
        self.relays.close()

    def _hello(self, purpose: str, to: int, beyond: int = -1) -> Hello:
        config = self.config
        return Hello(purpose, config.rank, to, config.world_size, self.epoch, self.fingerprint, beyond, config.seal)

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
        unwanted = unwanted or self.admission.failed
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

    def _take(self, purpose: str, peer: int, beside: Connection | None = None) -> Connection:
        found = self.admission.take(purpose, peer, self.deadline, None if beside is None else beside.sock)
        self.opened.append(found.sock)
        return found

    def _card(self, left: Connection | None, right: Connection | None, right_at: list[Address]) -> Card:
        place = own_place(self.config, self.port, [found.sock for found in (left, right) if found is not None])
        there = right_at[0] if right is None else reached(right.sock, right_at)
        return Card(self.config.rank, place, there, machine_id())

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
            own = Address(address_towards(master), self.port)
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
