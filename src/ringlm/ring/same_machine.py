"""Unix sockets between ranks of one machine, in place of TCP: a tenth to a quarter faster
(docs/performance.md).

Who listens on a TCP port listens on a Unix socket of that name, too, in Linux's abstract namespace: it leaves no
file, and is reached from just where loopback is. On other systems there is none, and TCP serves. Knows no ranks.
"""

from __future__ import annotations

import socket
import struct
import sys

from ringlm.ring.address import is_loopback, local_addresses

_CREDENTIALS = struct.Struct("3i")  # process, user, group
_WILDCARDS = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}


def listen_beside(sock: socket.socket) -> socket.socket | None:
    """A bound Unix socket for who looks for the port of `sock` on this machine; None if there can be none."""
    if sys.platform != "linux":
        return None
    host, port = sock.getsockname()[:2]
    unix = socket.socket(socket.AF_UNIX)
    try:
        unix.bind(_name(host, port))
    except OSError:  # the name is taken, or the system forbids it
        unix.close()
        return None
    return unix


def connect_beside(sock: socket.socket, timeout_s: float) -> socket.socket | None:
    """A connection to the same peer as `sock`'s, if that is on this machine; None leaves it to TCP."""
    host, port = sock.getpeername()[:2]
    if sys.platform != "linux" or not (is_loopback(host) or host in local_addresses()):
        return None
    for name in (host, _WILDCARDS[sock.family]):
        unix = socket.socket(socket.AF_UNIX)
        unix.settimeout(timeout_s)
        try:
            unix.connect(_name(name, port))
            return unix
        except OSError:  # there is none of that name, or the system forbids it
            unix.close()
    return None


def caller(sock: socket.socket) -> str:
    """Who is at the other end of an accepted Unix socket, for messages."""
    pid, _, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return f"process {pid} of this machine"


def leaves(sock: socket.socket) -> bool:
    """Whether what a connected socket carries leaves this machine, as far as its addresses show."""
    return sock.family != socket.AF_UNIX and not (
        is_loopback(sock.getpeername()[0]) or sock.getpeername()[0] == sock.getsockname()[0]
    )


def own_host(sock: socket.socket) -> str:
    """The address of this machine that a link has."""
    return "127.0.0.1" if sock.family == socket.AF_UNIX else str(sock.getsockname()[0])


def _name(host: str, port: int) -> str:
    return f"\0ringlm {host} {port}"
