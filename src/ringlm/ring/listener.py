"""One listening port a rank, for every kind of link: admits peers, turns away everybody else.

A thread accepts and drives the handshakes, event by event. Until a connection has authenticated it
costs one socket, at most MAX_MESSAGE bytes, and at most HANDSHAKE_S seconds; only MAX_PENDING of them
wait at a time, and a crowd of them is looked at now and then (`strangers`). What it does not know: what the
links are used for.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable

from ringlm.errors import AuthenticationError, ConnectError, RingError
from ringlm.ring.address import Address
from ringlm.ring.handshake import Agreed, Handshake, Hello, RefusedError, Terms, respond
from ringlm.ring.same_machine import caller, leaves
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import ended, tune
from ringlm.ring.strangers import LOOK_S, PAUSE_S, Crowd, gives_way, source

HANDSHAKE_S = 10.0
MAX_PENDING = 256
_ACCEPTED = 32  # at most, before those that wait are looked at

log = logging.getLogger("ringlm.ring")


class _Pending:
    """A connection that has not yet said, or proved, who it is."""

    def __init__(self, sock: socket.socket, name: str, source: str, handshake: Handshake) -> None:
        self.sock = sock
        self.name = name
        self.source = source
        self.handshake = handshake
        self.deadline = time.monotonic() + HANDSHAKE_S
        self.needed = next(handshake)  # a listener's handshake begins by reading
        self.received = b""

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


class Listener:
    """Accepts links on `sockets` until closed. `admit` raises RefusedError for a hello that is not wanted;
    `relay` gets the links that are to lead to another rank, and its number.
    `complete`: every link that belongs here has been taken."""

    def __init__(
        self,
        sockets: list[socket.socket],
        rank: int,
        terms: Terms,
        admit: Callable[[Hello], None],
        relay: Callable[[socket.socket, int], None] | None = None,
    ) -> None:
        self.port = int(sockets[0].getsockname()[1])
        self.complete = False
        self._sockets = sockets
        self._rank = rank
        self._terms = terms
        self._admit = admit
        self._relay = relay
        self._failure: RingError | None = None
        self._links: dict[tuple[str, int], socket.socket] = {}  # every link that was admitted
        self._waiting: dict[tuple[str, int], Connection] = {}  # those that nobody has taken yet
        self._changed = threading.Condition()
        self._refusal = ""  # the last one, for the error of a rank that waited in vain
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._pending: dict[socket.socket, _Pending] = {}
        self._crowd = Crowd()
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ringlm-listener", daemon=True)
        self._thread.start()

    def take(self, purpose: str, rank: int, deadline: float) -> Connection:
        """The link that `rank` opened for `purpose`, tuned. Raises ConnectError at the deadline."""
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
                        f"rank {rank} did not connect to rank {self._rank} on port {self.port} in time. "
                        f"Is it started, with the same ports?{why}"
                    )
                self._changed.wait(left_s)

    def fail(self, error: RingError) -> None:
        """What others wait for will not come: `take` raises `error`."""
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening and drop connections nobody took. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._wake.send(b"x")
        self._thread.join(5.0)
        untaken = [connection.sock for connection in self._waiting.values()]
        for sock in (*self._sockets, *untaken, self._wake, self._woken):
            sock.close()

    def _check(self, hello: Hello) -> None:
        """Raises RefusedError."""
        self._admit(hello)
        if hello.purpose == "relay":  # as many as are wanted, and as late
            return
        held = self._links.get((hello.purpose, hello.rank))
        if held is not None and not ended(held):
            raise RefusedError(
                f"rank {hello.rank} is connected to rank {self._rank} already; give every rank a number of its own."
            )
        if self.complete:  # one that is about to end, perhaps, and to be started anew
            raise RefusedError(f"the ring of rank {self._rank} is complete.", final=False)

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
            handshake = respond(self._rank, self._terms, name, self._check, far)
            self._pending[sock] = _Pending(sock, name, source(peer[0]) if peer else "", handshake)
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
            if isinstance(error, RefusedError | AuthenticationError):
                self._refusal = f"{connection.name}: {error}"
                self._tell(logging.WARNING, self._refusal)
            else:
                self._tell(logging.INFO, f"{connection.name}: {error}")
            return
        except Exception:
            # A fault of ours, which no stranger may turn into the end of this thread.
            log.exception("the handshake with %s failed", connection.name)
            self._drop(sock)
            return
        self._selector.unregister(sock)
        del self._pending[sock]
        hello = agreed.hello
        if hello.purpose == "relay" and self._relay is not None:
            self._relay(sock, hello.beyond)
            return
        key = (hello.purpose, hello.rank)
        with self._changed:
            replaced = self._waiting.get(key)
            self._links[key], self._waiting[key] = sock, Connection(sock, agreed.seal)
            self._changed.notify_all()
        if replaced is not None:
            replaced.sock.close()
