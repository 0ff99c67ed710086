"""Socket options, listening sockets and dialling with retries. Knows addresses, not ranks."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence

import msgspec

from ringlm.errors import AuthenticationError, ConfigError, ConnectError
from ringlm.ring.address import Address, interface_address, is_loopback
from ringlm.ring.config import RingConfig
from ringlm.ring.handshake import Agreed, Handshake, Hello, RefusedError, initiate
from ringlm.ring.same_machine import connect_beside, leaves, listen_beside
from ringlm.ring.seal import Connection, overhead, pack, unpack

# A rank that waits yields its core for so long before it sleeps: a sleeping virtual core takes longer to wake than most
# waits last.
SPIN_S = 1e-3
_BUFFER_BYTES = 1 << 21  # two ranks need half of it; those that take turns on a core get further in theirs
_BLOCK_S = 0.5  # a blocking call returns this often to look at its deadline
_CONNECT_S = 5.0  # for one attempt to connect
_KNOWN_CONNECT_S = 2.0  # to a peer that is known to listen
_HANDSHAKE_S = 10.0  # for one handshake of a dialler

if hasattr(os, "sched_yield"):
    yield_core: Callable[[], None] = os.sched_yield
else:

    def yield_core() -> None:
        """Let another process have this core (macOS has no os.sched_yield)."""
        time.sleep(0)


def tune(sock: socket.socket) -> None:
    """Options of every link: bounded blocking; for TCP no Nagle, keep-alive, and no pacing on loopback."""
    sock.settimeout(None)
    for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        sock.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
    limit = struct.pack("@ll", int(_BLOCK_S), int(_BLOCK_S % 1 * 1_000_000))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        sock.setsockopt(socket.SOL_SOCKET, option, limit)
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_CONGESTION") and is_loopback(sock.getpeername()[0]):
        # A pacing congestion control (BBR) holds even loopback back by a third; not every kernel has reno.
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, b"reno")


def listen(port: int, *, beyond_loopback: bool, interface: str | None) -> list[socket.socket]:
    """Listening sockets, all on one port (`port`, or a free one for 0), TCP's first.

    Binds `interface` (a name or an address), or else all addresses, or loopback's alone unless
    `beyond_loopback`, with Unix sockets beside them. Raises ConfigError when the port is taken, or the
    interface not allowed or unknown.
    """
    if interface is not None:
        hosts = [interface_address(interface)]
        if not beyond_loopback and not is_loopback(hosts[0]):
            raise ConfigError(
                f"--interface {interface} can be reached from other machines; listening there needs a shared "
                "secret: set RING_SECRET or --secret-file to the same value on every rank."
            )
    else:
        hosts = ["0.0.0.0", "::"] if beyond_loopback else ["127.0.0.1", "::1"]
    for attempts_left in reversed(range(16)):
        try:
            return _bind(hosts, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"cannot listen on port {port} of {hosts[0]}: {error.strerror}.") from None
            if port != 0:
                raise ConfigError(f"port {port} is taken by another program; set RING_PORT to a free one.") from None
            if not attempts_left:  # a port that is free in one family may be taken in the other
                raise ConfigError("no free port was found; set RING_PORT.") from None
    raise AssertionError


def _bind(hosts: list[str], port: int) -> list[socket.socket]:
    """Sockets listening on `port` of every one of `hosts` whose family this machine has, and Unix sockets beside
    them. Raises OSError."""
    sockets: list[socket.socket] = []
    try:
        for host in hosts:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
                sockets.append(sock)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                sock.bind(address)
            except OSError as error:
                if host == hosts[0] or error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                    raise
                sockets.pop().close()  # this machine has no IPv6
            port = sockets[0].getsockname()[1]
        sockets += [unix for unix in map(listen_beside, sockets) if unix is not None]
        for sock in reversed(sockets):  # Unix sockets first: who reaches the port finds them there
            sock.listen(128)
            sock.setblocking(False)
    except OSError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def run_blocking(handshake: Handshake, sock: socket.socket, deadline: float) -> Agreed | None:
    """Drive one side of a handshake over a connected socket; what it returns. Raises its errors, and OSError."""
    reply = b""
    try:
        action = next(handshake)
        while True:
            if isinstance(action, bytes):
                send_all(sock, action, deadline)
                reply = b""
            else:
                reply = receive_exactly(sock, action, deadline)
            action = handshake.send(reply)
    except StopIteration as done:
        agreed: Agreed | None = done.value
        return agreed


def send_message(connection: Connection, body: bytes, deadline: float) -> None:
    """A message of its length (4 bytes) and its bytes, sealed if the connection is. Raises OSError."""
    send_all(connection.sock, pack(len(body).to_bytes(4, "little"), body, connection.seal), deadline)


def receive_message(connection: Connection, limit: int, deadline: float) -> bytes:
    """What the peer gave `send_message`. Raises OSError, also for more than `limit` bytes and for damaged ones."""
    sock, seal = connection
    head = receive_exactly(sock, 4, deadline)
    nbytes = int.from_bytes(head, "little")
    if nbytes > limit:
        raise ConnectionAbortedError(errno.ECONNABORTED, f"a message of {nbytes:,} bytes was announced")
    body = unpack(head, receive_exactly(sock, overhead(seal) + nbytes, deadline), seal)
    if body is None:
        raise ConnectionAbortedError(errno.ECONNABORTED, "the link damages what it carries")
    return body


def send_all(sock: socket.socket, data: bytes, deadline: float) -> None:
    """All of `data` by `deadline` (on time.monotonic). Raises OSError."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    sock.sendall(data)


def receive_exactly(sock: socket.socket, nbytes: int, deadline: float) -> bytes:
    """`nbytes` by `deadline` (on time.monotonic). Raises OSError; ConnectionError at the end of the stream."""
    data = bytearray()
    while len(data) < nbytes:
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        piece = sock.recv(nbytes - len(data))
        if not piece:
            raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
        data += piece
    return bytes(data)


def ended(sock: socket.socket) -> bool:
    """Whether the peer has closed a link, or this rank has. From any thread; takes nothing from the link."""
    try:
        with socket.fromfd(sock.fileno(), sock.family, sock.type) as probe:  # without its owner's timeout
            return not probe.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    except OSError:
        return True


def spoken(sock: socket.socket, deadline: float) -> bool:
    """Wait until a peer says something, or `deadline` passes; False when it closes the link instead."""
    sock.settimeout(max(0.001, deadline - time.monotonic()))
    try:
        return bool(sock.recv(1, socket.MSG_PEEK))
    except TimeoutError:
        return True
    except OSError:
        return False


def dial(
    addresses: Sequence[Address],
    hellos: Sequence[Hello],
    config: RingConfig,
    what: str,
    deadline: float,
    *,
    tries: int | None = None,
    unwanted: threading.Event | None = None,
) -> Connection:
    """Connect to the first address that answers, from the interface and with the secret of `config`, and say `hellos`,
    a handshake after the other, the last one's seal being the link's; again and again until `deadline`.

    Ranks start in any order, so refusals by the kernel and resets are retried with backoff; a final
    refusal by a ringlm peer is not. With `tries` the peer is known to listen, at one of the addresses: each
    is tried that often, and what answers at the wrong ones means nothing. `what` names the peer in errors,
    and `unwanted` ends it. Raises ConnectError or AuthenticationError; what is returned is tuned.
    """
    pause_s, last, turn = 0.02, "no answer", 0
    while True:
        turn += 1
        for address in addresses:
            connect_s = _CONNECT_S if tries is None else _KNOWN_CONNECT_S
            try:
                return _attempt(address, hellos, config, f"{what} ({address})", deadline, connect_s)
            except (ConnectError, AuthenticationError) as error:
                final = isinstance(error, AuthenticationError) or (isinstance(error, RefusedError) and error.final)
                if final and tries is None:
                    raise
                last = str(error).rstrip(".")
            except (OSError, UnicodeError) as error:
                last = f"{address}: {getattr(error, 'strerror', None) or error}"
        if time.monotonic() + pause_s >= deadline or turn == tries or (unwanted is not None and unwanted.is_set()):
            raise ConnectError(
                f"{what} could not be reached at {' or '.join(map(str, addresses))}: {last}. "
                "Is it started, with the same ports, and is no firewall between?"
            )
        time.sleep(pause_s * random.uniform(0.7, 1.3))
        pause_s = min(pause_s * 1.6, 1.0)


def _attempt(
    address: Address, hellos: Sequence[Hello], config: RingConfig, name: str, deadline: float, connect_s: float
) -> Connection:
    source = interface_address(config.interface) if config.interface else None
    timeout_s = max(0.001, min(connect_s, deadline - time.monotonic()))
    sock = socket.create_connection(address, timeout_s, (source, 0) if source else None)
    try:
        if sock.getsockname() == sock.getpeername():
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens there yet")  # TCP met itself
        unix = connect_beside(sock, timeout_s)
        if unix is not None:
            sock.close()
            sock = unix
        far = leaves(sock) or len(hellos) > 1  # several: by way of other ranks, which could read it
        agreed, stop = None, min(deadline, time.monotonic() + _HANDSHAKE_S)
        for hello in hellos:
            said = msgspec.structs.replace(hello, far=far)
            agreed = run_blocking(initiate(said, config.secret, name), sock, stop)
        tune(sock)
        return Connection(sock, agreed.seal if agreed is not None else None)
    except BaseException:
        sock.close()
        raise
