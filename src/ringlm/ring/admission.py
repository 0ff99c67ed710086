"""Who belongs in a ring that is being formed: its ranks' links, kept until they are taken; everybody else is refused.

What it does not know: sockets that listen, handshakes, who forms the ring.
"""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

from ringlm.errors import ConnectError, RingError
from ringlm.ring.cards import left_early
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Hello, RefusedError, check_model
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import ended

_LOOK_S = 0.25


class Admission:
    """The links to rank `config.rank` of one ring, in one epoch. `relay` gets those that are to lead to another rank,
    and its number; `shut` ends what waits on other links when this fails. `complete`: every link that belongs here has
    been taken."""

    def __init__(
        self,
        config: RingConfig,
        epoch: int,
        fingerprint: str,
        port: int,
        relay: Callable[[socket.socket, int], None],
        shut: Callable[[], None],
    ) -> None:
        self.epoch = epoch
        self.complete = False
        self.failed = threading.Event()
        self._config = config
        self._fingerprint = fingerprint
        self._port = port
        self._relay = relay
        self._shut = shut
        self._failure: RingError | None = None
        self._links: dict[tuple[str, int], socket.socket] = {}  # every link that was admitted
        self._waiting: dict[tuple[str, int], Connection] = {}  # those that nobody has taken yet
        self._changed = threading.Condition()
        self._refusal = ""  # the last one, for the error of a rank that waited in vain
        self._closed = False

    def take(self, purpose: str, rank: int, deadline: float, beside: socket.socket | None = None) -> Connection:
        """The link that `rank` opened for `purpose`, tuned. Raises ConnectError at the deadline, and when the link
        `beside` this one ends first."""
        key = (purpose, rank)
        with self._changed:
            while True:
                if self._failure is not None:
                    raise self._failure
                found = self._waiting.pop(key, None)
                if found is not None and not ended(found.sock):
                    return found
                if found is not None:
                    found.sock.close()  # that rank was ended meanwhile, and may be started again
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    why = f" Turned away last: {self._refusal}" if self._refusal else ""
                    raise ConnectError(
                        f"rank {rank} did not connect to rank {self._config.rank} on port {self._port} in time. "
                        f"Is it started, with the same ports?{why}"
                    )
                if beside is not None and ended(beside):
                    raise ConnectError(left_early(self._config.rank, "the link was closed"))
                self._changed.wait(min(left_s, _LOOK_S))

    def fail(self, error: RingError) -> None:
        """The ring will not be formed, unless it is complete: `take` raises `error`, also where it waits."""
        with self._changed:
            if self.complete:
                return
            self._failure = error
            self.failed.set()
            self._changed.notify_all()
        self._shut()

    @property
    def failure(self) -> RingError | None:
        """What `fail` was told."""
        return self._failure

    def close(self) -> None:
        """Drop the links that nobody took, and take no more. Idempotent."""
        with self._changed:
            self.complete = self._closed = True
            for link in self._waiting.values():
                link.sock.close()
            self._waiting.clear()

    # -- for the listener ----------------------------------------------------------------------

    def refused(self, why: str) -> None:
        self._refusal = why

    def admit(self, hello: Hello) -> int:
        """This rank, for who belongs in this ring. Raises RefusedError for everybody else."""
        rank = self._config.rank
        self._judge_epoch(hello)
        self._judge_place(hello)
        check_model(hello.fingerprint, self._fingerprint, f"rank {hello.rank}", f"rank {rank}")
        if hello.purpose == "relay" and not self._closed:  # as many as are wanted, and as late
            return rank
        # Once all links are there, any of them tells that their rank lives.
        held = [
            sock
            for (purpose, peer), sock in self._links.items()
            if peer == hello.rank and (purpose == hello.purpose or self.complete)
        ]
        if not all(map(ended, held)):
            raise RefusedError(
                f"rank {hello.rank} is connected to rank {rank} already; give every rank a number of its own."
            )
        if self.complete:  # one that is about to end, perhaps, and to be started anew
            raise RefusedError(f"the ring of rank {rank} is complete.", final=False)
        return rank

    def receive(self, hello: Hello, link: Connection) -> None:
        if hello.purpose == "relay":
            self._relay(link.sock, hello.beyond)
            return
        key = (hello.purpose, hello.rank)
        with self._changed:
            replaced = self._waiting.pop(key, None) if not self._closed else link
            if not self._closed:
                self._links[key], self._waiting[key] = link.sock, link
            self._changed.notify_all()
        if replaced is not None:
            replaced.sock.close()

    def _judge_epoch(self, hello: Hello) -> None:
        if hello.epoch == self.epoch:
            return
        # A rank that was started anew knows of no epoch, and one that is ahead has only been told before this one.
        final = hello.epoch < self.epoch and (hello.epoch, hello.purpose) != (0, "ring")
        raise RefusedError(
            f"rank {hello.rank} is in epoch {hello.epoch}, this ring in epoch {self.epoch}.", final=final
        )

    def _judge_place(self, hello: Hello) -> None:
        config = self._config
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
