"""A data link: one TCP connection to one peer, and how ranks wait for bytes on several of them.

Both directions move at once and nothing blocks while there is something to do, so no payload can
deadlock. Waiting yields the core for SPIN_S, then sleeps in the kernel: a spinning rank would hold the
core that its peer needs, a sleeping one takes tens of microseconds to wake.
"""

from __future__ import annotations

import selectors
import socket
import time
from collections import deque
from collections.abc import Sequence

from ringlm.errors import CollectiveTimeoutError, PeerLostError
from ringlm.ring.sockets import yield_core
from ringlm.ring.wire import HEADER_BYTES

SPIN_S = 50e-6
_POLL_S = 0.5  # a sleeping rank looks this often at its deadline
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)  # cheapest to make for a single wait
_NOW = socket.MSG_DONTWAIT
_PIECE = 1 << 20  # of one send call; more gains nothing


class Link:
    """A tuned, connected socket to rank `peer`, which `name` names in errors."""

    __slots__ = ("header", "name", "peer", "sock")

    def __init__(self, sock: socket.socket, peer: int, name: str) -> None:
        self.sock = sock
        self.peer = peer
        self.name = name
        self.header = bytearray(HEADER_BYTES)  # the peer's header of the collective under way

    def lost(self, error: OSError | None = None) -> PeerLostError:
        """The error for a connection that has ended."""
        how = f"broke: {error.strerror or error}" if error is not None else "was closed"
        return PeerLostError(f"{self.name} is lost: its link {how}.", self.peer)

    def shut(self) -> None:
        """End both directions, waking whoever waits on this link; safe from another thread."""
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def send_first(self, out: Sequence[memoryview | bytes]) -> int:
        """Send what the kernel takes at once of a message; the number of bytes."""
        try:
            return self.sock.sendmsg(out, (), _NOW)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error

    def receive_first(self, into: memoryview, spin_s: float) -> int:
        """Whatever has arrived of header and body, waiting up to `spin_s` for the first byte; 0 for none."""
        sock, buffers = self.sock, (self.header, into)
        stop = 0.0
        while True:
            try:
                got = sock.recvmsg_into(buffers, 0, _NOW)[0]
            except BlockingIOError:
                now = time.perf_counter()
                if not stop:
                    stop = now + spin_s
                elif now > stop:
                    break
                yield_core()
                continue
            except OSError as error:
                raise self.lost(error) from error
            if got == 0:
                raise self.lost()
            return got
        try:
            got = sock.recvmsg_into(buffers)[0]  # asleep, for as long as SO_RCVTIMEO allows
        except BlockingIOError:
            return 0
        except OSError as error:
            raise self.lost(error) from error
        if got == 0:
            raise self.lost()
        return got


class Lane:
    """What one link has yet to send and to receive in a collective: two queues of buffers."""

    __slots__ = ("incoming", "link", "outgoing", "sent")

    def __init__(self, link: Link, outgoing: Sequence[memoryview | bytes] = ()) -> None:
        self.link = link
        self.sent = 0
        self.outgoing: deque[memoryview] = deque()
        self.incoming: deque[memoryview] = deque()
        for buffer in outgoing:
            self.send(buffer)

    def send(self, buffer: memoryview | bytes) -> None:
        """Queue bytes to send after what is queued."""
        if len(buffer):
            self.outgoing.append(memoryview(buffer))

    def receive(self, buffer: memoryview) -> None:
        """Queue memory to fill after what is queued."""
        if len(buffer):
            self.incoming.append(buffer)

    def move(self) -> bool:
        """Send and receive what the kernel takes and has at once; whether any byte moved."""
        moved = False
        try:
            while self.outgoing:
                buffer = self.outgoing[0]
                sent = self.link.sock.send(buffer[:_PIECE], _NOW)
                moved = True
                self.sent += sent
                self._advance(self.outgoing, sent)
        except BlockingIOError:
            pass
        except OSError as error:
            raise self.link.lost(error) from error
        try:
            while self.incoming:
                got = self.link.sock.recv_into(self.incoming[0], 0, _NOW)
                if got == 0:
                    raise self.link.lost()
                moved = True
                self._advance(self.incoming, got)
        except BlockingIOError:
            pass
        except OSError as error:
            raise self.link.lost(error) from error
        return moved

    @staticmethod
    def _advance(queue: deque[memoryview], nbytes: int) -> None:
        if nbytes == len(queue[0]):
            queue.popleft()
        else:
            queue[0] = queue[0][nbytes:]


def pump(lanes: Sequence[Lane], deadline: float, spin_s: float, *, sent: int | None = None) -> None:
    """Move bytes until every lane has received what it awaits and sent what it holds, or `sent` bytes at least.

    Raises PeerLostError, or CollectiveTimeoutError naming the first peer that is behind at `deadline`
    (on `time.perf_counter`).
    """
    stop = 0.0
    while True:
        moved = False
        for lane in lanes:
            if lane.outgoing or lane.incoming:
                moved |= lane.move()
        waiting = [lane for lane in lanes if lane.incoming or (lane.outgoing and (sent is None or lane.sent < sent))]
        if not waiting:
            return
        if moved:
            stop = 0.0
            continue
        now = time.perf_counter()
        if now >= deadline:
            late = waiting[0].link
            raise CollectiveTimeoutError(
                f"{late.name} did not take part in the collective in time; it may be busy, stopped or gone.",
                late.peer,
            )
        if not stop:
            stop = now + spin_s
        if now < stop:
            yield_core()
            continue
        _sleep(lanes, min(_POLL_S, deadline - now))


def _sleep(lanes: Sequence[Lane], timeout_s: float) -> None:
    """Until a link can move bytes, or the time has passed."""
    with _Selector() as selector:
        for lane in lanes:
            events = (selectors.EVENT_READ if lane.incoming else 0) | (selectors.EVENT_WRITE if lane.outgoing else 0)
            if events:
                selector.register(lane.link.sock, events)
        selector.select(timeout_s)
