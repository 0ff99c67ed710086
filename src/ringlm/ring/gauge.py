"""What a link between two machines can do: its round trip, and bytes per second each way.

One end dials a link of purpose `gauge` and asks; the other answers, on a thread a link. Rounds of bytes grow until one
takes long enough to tell the rate: what is sent is bounded, and so is the time. Knows no ranks, and not who is to be
measured when.
"""

from __future__ import annotations

import contextlib
import os
import socket
import statistics
import struct
import threading
import time
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec

from ringlm.errors import ConnectError
from ringlm.ring.address import Address
from ringlm.ring.cards import Port
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Hello, RefusedError
from ringlm.ring.same_machine import own_host
from ringlm.ring.seal import Connection
from ringlm.ring.sockets import dial, receive_exactly

LIMIT_S: Final = 2.5  # for a pair
MOST_BYTES: Final = 1 << 26  # of a round
_FIRST_BYTES: Final = 1 << 14
_ENOUGH_S: Final = 0.1  # a round that takes so long is the last
_ECHOES: Final = 40
_ECHO_S: Final = 0.2  # for all of them
_AT_ONCE: Final = 8  # links that are answered
_PIECE_BYTES: Final = 1 << 18
_REQUEST: Final = struct.Struct("<cI")  # what is asked, of how many bytes
_TAKEN: Final = struct.Struct("<IQ")  # bytes behind the first piece, and the nanoseconds that they took to come
_ECHO: Final = b"e"
_TAKE: Final = b"t"
_GIVE: Final = b"g"

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Reading(msgspec.Struct, frozen=True, array_like=True):
    """What was measured of a link: from `near`, an address of who has dialled, to `far`."""

    near: str
    far: tuple[str, Port]
    round_trip_s: _Positive
    out_bytes_per_s: _Positive
    in_bytes_per_s: _Positive

    @property
    def bytes_per_s(self) -> float:
        """That of the slower way."""
        return min(self.out_bytes_per_s, self.in_bytes_per_s)


def gauge(addresses: Sequence[Address], config: RingConfig) -> Reading:
    """Measure the link to whoever listens at one of `addresses`, with the secret and the interface of `config`; within
    LIMIT_S. Raises ConnectError, also for a link too slow for that, and AuthenticationError."""
    deadline = time.monotonic() + LIMIT_S
    if not addresses:
        raise ConnectError("the other end has no address that leads to it from here.")

    sock, _ = dial(addresses, [Hello("gauge", -1, 0, 0, 0, "")], config, "the other end", deadline, tries=1)
    with sock:
        far = addresses[0] if sock.family == socket.AF_UNIX else Address(*sock.getpeername()[:2])
        try:
            trip_s = _round_trip_s(sock, deadline)
            sent, received = _rate(sock, _TAKE, deadline), _rate(sock, _GIVE, deadline)
        except OSError as error:
            why = f"it is too slow to be measured in {LIMIT_S:g} s" if isinstance(error, TimeoutError) else str(error)
            raise ConnectError(f"the link to {far} was not measured: {why}.") from None
        return Reading(own_host(sock), far, trip_s, sent, received)


def _round_trip_s(sock: socket.socket, deadline: float) -> float:
    """The first quartile, without the first: of a machine that is busy the others tell how long it is."""
    trips: list[float] = []
    stop = time.monotonic() + _ECHO_S
    while len(trips) < 3 or (len(trips) < _ECHOES and time.monotonic() < stop):
        began = time.perf_counter()
        sock.sendall(_REQUEST.pack(_ECHO, 1))
        receive_exactly(sock, 1, deadline)
        trips.append(time.perf_counter() - began)
    return statistics.quantiles(trips[1:], n=4, method="inclusive")[0]


def _rate(sock: socket.socket, way: bytes, deadline: float) -> float:
    """Bytes per second, as they come to whoever receives."""
    nbytes = _FIRST_BYTES
    while True:
        began = time.monotonic()
        sock.sendall(_REQUEST.pack(way, nbytes))
        if way == _TAKE:
            _send(sock, nbytes, deadline)
            moved, took_ns = _TAKEN.unpack(receive_exactly(sock, _TAKEN.size, deadline))
        else:
            moved, took_ns = _receive(sock, nbytes, deadline)
        if (time.monotonic() - began >= _ENOUGH_S and moved) or nbytes == MOST_BYTES:
            return float(moved / max(1e-9, took_ns / 1e9))
        nbytes *= 2


def _send(sock: socket.socket, nbytes: int, deadline: float) -> None:
    """So many bytes, which no link can make smaller."""
    piece = os.urandom(min(nbytes, _PIECE_BYTES))
    for start in range(0, nbytes, _PIECE_BYTES):
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        sock.sendall(piece[: nbytes - start])


def _receive(sock: socket.socket, nbytes: int, deadline: float) -> tuple[int, int]:
    """Take so many bytes; how many came behind the first piece, and the nanoseconds between."""
    buffer, left, first, began = bytearray(_PIECE_BYTES), nbytes, 0, 0
    while left:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        count = sock.recv_into(buffer, min(left, _PIECE_BYTES))
        if not count:
            raise ConnectionResetError("the connection was closed")
        if not began:
            began, first = time.perf_counter_ns(), count
        left -= count
    return nbytes - first, time.perf_counter_ns() - began


class Gauges:
    """A listener's reception of links that measure; those who hold the secret are answered, a few at a time."""

    def __init__(self) -> None:
        self._links: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Answer no more. Idempotent."""
        with self._lock:
            self._closed = True
            answering = dict(self._links)
        for sock, thread in answering.items():
            with contextlib.suppress(OSError):  # its other end was first
                sock.shutdown(socket.SHUT_RDWR)
            thread.join(LIMIT_S)

    # -- for the listener ----------------------------------------------------------------------

    def admit(self, hello: Hello) -> int:
        if len(self._links) >= _AT_ONCE:
            raise RefusedError("other links are being measured here.", final=False)
        return hello.to

    def receive(self, hello: Hello, link: Connection) -> None:
        thread = threading.Thread(target=self._answer, args=(link.sock,), name="ringlm-gauge", daemon=True)
        with self._lock:
            if self._closed:
                link.sock.close()
                return
            self._links[link.sock] = thread
        thread.start()

    # -- a thread a link -----------------------------------------------------------------------

    def _answer(self, sock: socket.socket) -> None:
        deadline = time.monotonic() + LIMIT_S + 1.0  # the other end's comes first
        try:
            while True:
                what, nbytes = _REQUEST.unpack(receive_exactly(sock, _REQUEST.size, deadline))
                if what == _ECHO:
                    sock.sendall(what)
                elif what == _TAKE and 0 < nbytes <= MOST_BYTES:
                    sock.sendall(_TAKEN.pack(*_receive(sock, nbytes, deadline)))
                elif what == _GIVE and 0 < nbytes <= MOST_BYTES:
                    _send(sock, nbytes, deadline)
                else:
                    return  # none of these: it is no gauge
        except OSError:
            return  # the other end has all that it wanted, or its time is up
        finally:
            with self._lock:
                del self._links[sock]
            sock.close()
