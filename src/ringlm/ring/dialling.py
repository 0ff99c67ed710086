"""The links of a ring that is being formed, as one rank opens and takes them: straight, or by way of other ranks.

What it does not know: which links a ring needs, and in which order (`forming`).
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from ringlm.errors import ConnectError, RingError
from ringlm.ring.address import Address
from ringlm.ring.admission import Admission
from ringlm.ring.cards import Card, reach
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Hello
from ringlm.ring.listener import Listener
from ringlm.ring.relay import Relays
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import dial

_TRIES = 2  # to reach a rank that is known to listen, before other ranks are asked to lead there


class Opening:
    """Those of rank `config.rank`, in one epoch. `opened` are theirs so far, `relayed` the ranks that were reached by
    way of others. What leads to other ranks waits until this one is `informed` of their cards."""

    def __init__(self, config: RingConfig, fingerprint: str, listener: Listener, epoch: int) -> None:
        self.config = config
        self.epoch = epoch
        self.deadline = time.monotonic() + config.connect_timeout_s
        self.opened: list[socket.socket] = []
        self.relayed: set[int] = set()
        self.relays = Relays()
        self.port = listener.port
        self.admission = Admission(config, epoch, fingerprint, listener.port, self._relay, self._shut)
        listener.door = self.admission
        self._fingerprint = fingerprint
        self._cards: list[Card] = []
        self._informed = threading.Event()

    def inform(self, cards: list[Card]) -> None:
        """These are the ranks' cards, by rank."""
        self._cards = cards
        self._informed.set()

    def hello(self, purpose: str, to: int, beyond: int = -1) -> Hello:
        """What this rank says to open a link."""
        config = self.config
        return Hello(purpose, config.rank, to, config.world_size, self.epoch, self._fingerprint, beyond, config.seal)

    def dial(
        self,
        peer: int,
        addresses: list[Address],
        *hellos: Hello,
        tries: int | None = None,
        unwanted: threading.Event | None = None,
    ) -> Connection:
        """A link to a rank; see `sockets.dial`."""
        unwanted = unwanted or self.admission.failed
        found = dial(addresses, hellos, self.config, f"rank {peer}", self.deadline, tries=tries, unwanted=unwanted)
        self.opened.append(found.sock)
        return found

    def open(self, purpose: str, peer: int) -> Connection:
        """A link to a rank that listens: straight there, or by way of the ranks between."""
        rank = self.config.rank
        try:
            return self.dial(peer, reach(self._cards, peer, rank), self.hello(purpose, peer), tries=_TRIES)
        except ConnectError:
            if abs(peer - rank) == 1:
                raise
        self.relayed.add(peer)
        hop = rank + 1 if peer > rank else rank - 1
        hellos = self.hello("relay", hop, peer), self.hello(purpose, peer)
        return self.dial(peer, reach(self._cards, hop, rank), *hellos)

    def take(self, purpose: str, peer: int, beside: Connection | None = None) -> Connection:
        """The link that `peer` opens; see `Admission.take`."""
        found = self.admission.take(purpose, peer, self.deadline, None if beside is None else beside.sock)
        self.opened.append(found.sock)
        return found

    def discard(self) -> None:
        """Close everything: the ring will not be formed."""
        self.admission.close()
        for sock in self.opened:
            sock.close()
        self.relays.close()

    def _shut(self) -> None:
        """Wake whoever waits on a link that is open already."""
        for sock in list(self.opened):
            with contextlib.suppress(OSError):  # its peer was first
                sock.shutdown(socket.SHUT_RDWR)

    def _relay(self, sock: socket.socket, beyond: int) -> None:
        """A rank asks this one for a link to rank `beyond`."""
        rank = self.config.rank
        hop = rank + 1 if beyond > rank else rank - 1

        def onward() -> socket.socket:
            if not self._informed.wait(max(0.0, self.deadline - time.monotonic())):
                raise ConnectError(f"rank {rank} does not know yet where rank {beyond} is.")
            hellos = [self.hello("relay", hop, beyond)] if hop != beyond else []
            return self.dial(hop, reach(self._cards, hop, rank), *hellos, tries=_TRIES).sock

        self.relays.open(sock, onward)


class InBackground:
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
