"""One listening port a rank, for every kind of link and for ring after ring: turns strangers away.

A thread accepts and drives the handshakes, event by event. Until a connection has authenticated it
costs one socket, at most MAX_MESSAGE bytes, and at most HANDSHAKE_S seconds; only MAX_PENDING of them
wait at a time, and a crowd of them is looked at now and then (`strangers`). What it does not know: who is
wanted, and what the links are used for.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from typing import Protocol

from ringlm.errors import AuthenticationError, RingError
from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Agreed, Hello, Place, RefusedError, Terms, respond
from ringlm.ring.same_machine import caller, leaves
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import listen, tune
from ringlm.ring.strangers import LOOK_S, PAUSE_S, Crowd, gives_way, source

HANDSHAKE_S = 10.0
MAX_PENDING = 256
_ACCEPTED = 32  # at most, before those that wait are looked at

log = logging.getLogger("ringlm.ring")


class Reception(Protocol):
    """Who decides about the links of some purposes."""

    def admit(self, hello: Hello) -> int:
        """The rank that `hello` has reached. Raises RefusedError where it is not wanted."""
        ...

    def receive(self, hello: Hello, link: Connection) -> None:
        """Take an open link, tuned. Called by the listener's thread, and must not wait."""
        ...


class Door(Reception, Protocol):
    """Who forms a ring, and waits for links."""

    def refused(self, why: str) -> None:
        """Somebody was turned away: for the error of a rank that waits in vain."""
        ...

    def fail(self, error: RingError) -> None:
        """Whoever waits for a link here is to raise `error`."""
        ...


class _Pending:
    """A connection that has not yet said, or proved, who it is."""

    def __init__(self, sock: socket.socket, name: str, source: str, far: bool, listener: Listener) -> None:
        self.sock = sock
        self.name = name
        self.source = source
        self.reception: Reception | None = None  # who has admitted it
        self.handshake = respond(listener.terms, name, self._admit, far)
        self.deadline = time.monotonic() + HANDSHAKE_S
        self.needed = next(self.handshake)  # a listener's handshake begins by reading
        self.received = b""
        self._listener = listener

    def advance(self) -> Agreed | None:
        """Take what has arrived; what was agreed once the handshake is complete. Raises its errors and OSError."""
        assert isinstance(self.needed, int)
        piece = self.sock.recv(self.needed - len(self.received))
        if not piece:
            raise ConnectionResetError("closed before it said who it is")
        self.received += piece
        if len(self.received) < self.needed:
            return None
        try:
            action = self.handshake.send(self.received)
            while isinstance(action, bytes):
                # A few hundred bytes into an empty send buffer: never blocks.
                self.sock.sendall(action)
                action = self.handshake.send(b"")
        except StopIteration as done:
            agreed: Agreed = done.value
            return agreed
        self.needed, self.received = action, b""
        return None

    def _admit(self, hello: Hello) -> int:
        self.reception = self._listener.reception(hello)
        try:
            return self.reception.admit(hello)
        except RefusedError as refusal:
            if hello.purpose == "ring" and hello.epoch == 0 and not refusal.final:
                # It was started while a ring runs, or waits to be formed again: its place is behind rank 0's door.
                join = self._listener.join_at
                raise RefusedError(str(refusal), join is not None, join) from None
            raise


class Listener:
    """Accepts links on `sockets` until closed; whose they are is for `door` to say, of the links of a ring, for
    `lobby`, of those who want to join one, and for `gauges`, of those that only measure. `join_at` is where a rank that
    comes too late for the ring may join."""

    def __init__(self, sockets: list[socket.socket], terms: Terms) -> None:
        self.port = int(sockets[0].getsockname()[1])
        self.terms = terms
        self.door: Door | None = None
        self.lobby: Reception | None = None
        self.gauges: Reception | None = None
        self.join_at: Place | None = None
        self._sockets = sockets
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._pending: dict[socket.socket, _Pending] = {}
        self._crowd = Crowd()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ringlm-listener", daemon=True)
        self._thread.start()

    def reception(self, hello: Hello) -> Reception:
        """Who decides about `hello`. Raises RefusedError where nobody does."""
        if hello.purpose == "join":
            if self.lobby is None:
                why = "nobody is taken in here: rank 0 does that, unless its --rejoin-timeout is 0."
                # It has just been started, or will be: who was in its ring waits for that.
                raise RefusedError(why, final=self.door is not None and not hello.epoch)
            return self.lobby
        if hello.purpose == "gauge" and self.gauges is not None:
            return self.gauges
        if self.door is None:
            raise RefusedError("no ring is being formed here yet.", final=False)
        return self.door

    def close(self) -> None:
        """Stop listening and drop unfinished connections. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake.send(b"x")
        self._thread.join(5.0)
        for sock in (*self._sockets, self._wake, self._woken):
            sock.close()

    def _run(self) -> None:
        for sock in (*self._sockets, self._woken):
            self._selector.register(sock, selectors.EVENT_READ)
        while not self._closed:
            now = time.monotonic()
            for late in [pending.sock for pending in self._pending.values() if pending.deadline <= now]:
                self._drop(late)
            wait_s = next((pending.deadline - now for pending in self._pending.values()), None)  # the oldest's
            ready = [key.fileobj for key, _ in self._selector.select(wait_s)]
            stop = time.monotonic() + LOOK_S
            for found in ready:
                assert isinstance(found, socket.socket)
                if found in self._pending:
                    self._advance(self._pending[found])
                elif found in self._sockets:
                    self._accept(found)
                if self._crowd.here and time.monotonic() > stop:
                    break  # who was not looked at is ready still
            if self._crowd.here and not self._closed:
                time.sleep(PAUSE_S)
        for sock in list(self._pending):
            self._drop(sock)
        self._selector.close()

    def _drop(self, sock: socket.socket) -> None:
        self._selector.unregister(sock)
        del self._pending[sock]
        sock.close()
        self._crowd.turned_away()

    def _accept(self, listening: socket.socket) -> None:
        for _ in range(_ACCEPTED):
            try:
                sock, peer = listening.accept()
            except BlockingIOError:
                return
            except OSError:  # it left before it was accepted, or this process is out of descriptors
                time.sleep(0.01)
                return
            try:
                far = leaves(sock)
            except OSError:  # it has left since
                sock.close()
                self._crowd.turned_away()
                continue
            if len(self._pending) >= MAX_PENDING:
                self._drop(gives_way({waiting: pending.source for waiting, pending in self._pending.items()}))
            sock.setblocking(False)
            name = str(Address(peer[0], peer[1])) if peer else caller(sock)
            self._pending[sock] = _Pending(sock, name, source(peer[0]) if peer else "", far, self)
            self._selector.register(sock, selectors.EVENT_READ)

    def _tell(self, level: int, why: str) -> None:
        """Log whom was turned away; of a crowd only the last."""
        crowd = self._crowd
        if crowd.here:
            crowd.untold += 1
            return
        log.log(level, "turned away %s%s", why, f" (and {crowd.untold:,} before it)" if crowd.untold else "")
        crowd.untold = 0

    def _advance(self, connection: _Pending) -> None:
        sock = connection.sock
        try:
            agreed = connection.advance()
            if agreed is None:
                return
            tune(sock)
        except BlockingIOError:
            return  # a false alarm: nothing to read after all
        except OSError:
            self._drop(sock)  # it left, as port scanners and health checks do
            return
        except RingError as error:
            self._drop(sock)
            why = f"{connection.name}: {str(error).removeprefix(connection.name).lstrip()}"
            if isinstance(error, RefusedError | AuthenticationError):
                lasting = not isinstance(error, RefusedError) or (error.final and error.join is None)
                self._tell(logging.WARNING if lasting else logging.INFO, why)
                if self.door is not None:
                    self.door.refused(why)
            else:
                self._tell(logging.INFO, why)
            return
        except Exception:
            # A fault of ours, which no stranger may turn into the end of this thread.
            log.exception("the handshake with %s failed", connection.name)
            self._drop(sock)
            return
        self._selector.unregister(sock)
        del self._pending[sock]
        assert connection.reception is not None
        connection.reception.receive(agreed.hello, Connection(sock, agreed.seal))


def open_listener(config: RingConfig) -> Listener:
    """Listen where `config` says. Raises ConfigError."""
    sockets = listen(config.port, beyond_loopback=config.secret is not None, interface=config.interface)
    return Listener(sockets, Terms(config.secret, config.seal))
