"""Links by way of other ranks, where no cable leads straight to a peer: machines in a chain.

A rank asks its neighbour on the way for a link onward; that one dials the next rank, or the peer itself, and
from then on copies bytes both ways. The two ends make their own handshake through it, so with a secret a
relay can neither read it nor take part. What it does not know: what the bytes are.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable

from ringlm.errors import RingError

_BUFFER_BYTES = 1 << 18
_IDLE_S = 0.3  # without a byte, for which a rank that leaves waits
_LEAVE_S = 5.0  # for which it waits at most


class Relays:
    """The links that lead through this rank, each with a thread for either direction."""

    def __init__(self) -> None:
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._moved = 0.0
        self._closed = False

    def open(self, sock: socket.socket, onward: Callable[[], socket.socket]) -> None:
        """Connect `sock` with what `onward` dials. Returns at once."""
        self._start(sock, lambda: self._connect(sock, onward))

    def close(self) -> None:
        """End all, once what is on its way has arrived. Idempotent."""
        stop = time.monotonic() + _LEAVE_S
        while any(thread.is_alive() for thread in self._threads) and time.monotonic() < stop:
            if time.monotonic() - self._moved > _IDLE_S and self._closed:
                break
            self._closed = True
            time.sleep(0.02)
        with self._lock:
            self._closed = True
            for sock in self._sockets:
                _shut(sock, socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(1.0)
        for sock in self._sockets:
            sock.close()

    def _start(self, sock: socket.socket, work: Callable[[], None]) -> None:
        with self._lock:
            self._sockets.append(sock)
            thread = threading.Thread(target=work, name="ringlm-relay", daemon=True)
            self._threads.append(thread)
            thread.start()

    def _connect(self, sock: socket.socket, onward: Callable[[], socket.socket]) -> None:
        try:
            other = onward()
        except (RingError, OSError):
            _shut(sock, socket.SHUT_RDWR)  # who asked for it tries again, and says what it could not reach
            return
        self._moved = time.monotonic()
        self._start(other, lambda: self._copy(other, sock))
        self._copy(sock, other)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        """Everything from one to the other, until the end."""
        buffer = memoryview(bytearray(_BUFFER_BYTES))
        try:
            while got := _retried(source, lambda: source.recv_into(buffer)):
                self._moved = time.monotonic()
                rest = buffer[:got]
                while rest:
                    rest = rest[_retried(target, lambda rest=rest: target.send(rest)) :]  # type: ignore[misc]
        except OSError:
            _shut(source, socket.SHUT_RDWR)
        _shut(target, socket.SHUT_WR)


def _retried(sock: socket.socket, move: Callable[[], int]) -> int:
    """A blocking call, whose time limit ends a turn and no more."""
    while True:
        try:
            return move()
        except BlockingIOError:
            continue


def _shut(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):
        sock.shutdown(how)
