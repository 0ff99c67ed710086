"""Memory that two ranks of one machine share, in which the bodies of large frames go from one to the other: the kernel
copies them into a socket's buffers and out again, too, and takes twice as long.

Each direction has slots of a frame's body, used by turns; who has emptied one says so on a socket of its own,
which can be waited for. What it does not know: when a frame goes this way (`lane`), and what is in it.
Format in docs/protocol.md.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import mmap
import os
import socket
import time
from collections.abc import Collection, Mapping

from ringlm.errors import ConnectError
from ringlm.ring.seal import Connection

_DIRECTION_BYTES = 1 << 20  # more would not stay in the cache
_SLOTS = range(2, 1025)  # one is filled while another is emptied
_YES, _NO = b"\1", b"\0"
_NOW = socket.MSG_DONTWAIT


class Area:
    """One end of such memory. `full`: every slot was in use when `put` was called last.

    `credits` is readable once that has changed, or the peer is gone.
    """

    __slots__ = ("_emptied", "_free", "_from", "_slots", "_to", "credits", "full")

    def __init__(self, memory: mmap.mmap, credits: socket.socket, slot_bytes: int, first: bool) -> None:
        self.credits = credits
        self.full = False
        self._free = self._slots = count = slots(slot_bytes)
        self._emptied = 0  # of the peer's slots, those of which it does not know yet
        view = memoryview(memory)
        bodies = [view[index * slot_bytes : (index + 1) * slot_bytes] for index in range(2 * count)]
        upward, downward = itertools.cycle(bodies[:count]), itertools.cycle(bodies[count:])
        self._to, self._from = (upward, downward) if first else (downward, upward)

    def put(self, body: memoryview) -> bool:
        """Copy a body for the peer; False where there is no free slot. Raises OSError where the peer is gone."""
        if not self._free:
            try:
                emptied = len(self.credits.recv(self._slots, _NOW))
            except BlockingIOError:
                self.full = True
                return False
            if not emptied:
                raise ConnectionResetError("was closed")
            self._free = emptied
        self.full = False
        self._free -= 1
        next(self._to)[: len(body)] = body
        return True

    def take(self, body: memoryview) -> None:
        """Fill `body` with the one that the peer has put next."""
        body[:] = next(self._from)[: len(body)]
        self._emptied += 1
        if 2 * self._emptied >= self._slots:  # before the peer has filled the others
            with contextlib.suppress(OSError):  # who left after its last frame needs no room; its link tells the rest
                self.credits.send(bytes(self._emptied), _NOW)
            self._emptied = 0

    def shut(self) -> None:
        """Wake whoever waits on `credits`; safe from another thread."""
        with contextlib.suppress(OSError):  # it has ended already
            self.credits.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give everything back."""
        self.credits.close()
        self._to = self._from = itertools.cycle(())  # the memory goes with the last view of it


def slots(slot_bytes: int) -> int:
    """How many slots there are in each direction."""
    return min(max(_DIRECTION_BYTES // slot_bytes, _SLOTS[0]), _SLOTS[-1])


def area_bytes(slot_bytes: int) -> int:
    """The size of the memory, both directions together."""
    return -(-2 * slots(slot_bytes) * slot_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def open_areas(
    rank: int, links: Mapping[int, Connection], through: Collection[int], slot_bytes: int, deadline: float
) -> dict[int, Area]:
    """Agree with the peers of `links` on memory to share, by peer, until `deadline` (`time.monotonic`).

    Those `through` other ranks have none, nor have those on other machines or behind a seal, or where either system
    refuses. Raises ConnectError.
    """
    near = {
        peer: sock
        for peer, (sock, seal) in sorted(links.items())
        if sock.family == socket.AF_UNIX and seal is None and peer not in through
    }
    areas: dict[int, Area | None] = {}
    peer = rank
    try:
        for sock in near.values():
            sock.settimeout(max(0.001, deadline - time.monotonic()))
        for peer in near:  # nobody waits before all offers are made
            if peer > rank:
                areas[peer] = offer(near[peer], slot_bytes)
        for peer in near:
            if peer < rank:
                areas[peer] = accept(near[peer], slot_bytes)
        for peer in near:
            if peer > rank and _heard(near[peer].recv(1)) != _YES and (unwanted := areas.pop(peer)) is not None:
                unwanted.close()
    except OSError as error:
        for area in areas.values():
            if area is not None:
                area.close()
        raise ConnectError(
            f"rank {peer} left while memory was being shared with it: {error}. See what it said last; start all again."
        ) from None
    return {peer: area for peer, area in areas.items() if area is not None}


def offer(sock: socket.socket, slot_bytes: int) -> Area | None:
    """The lower rank's part: make the memory and pass it on, or say that there is none."""
    try:
        descriptor, memory = _sealed_memory(area_bytes(slot_bytes))
    except (OSError, AttributeError):  # this system has no such memory, or no more of it
        sock.send(_NO)
        return None
    with contextlib.ExitStack() as passed:
        passed.callback(os.close, descriptor)
        ours, theirs = socket.socketpair()
        passed.enter_context(theirs)
        area = Area(memory, ours, slot_bytes, first=True)
        try:
            socket.send_fds(sock, [_YES], [descriptor, theirs.fileno()])
        except BaseException:
            area.close()
            raise
        return area


def accept(sock: socket.socket, slot_bytes: int) -> Area | None:
    """The other's: map it, if it is what it should be, and say whether it is wanted."""
    said, descriptors, _, _ = socket.recv_fds(sock, 1, 2, socket.MSG_CMSG_CLOEXEC)
    area = None
    try:
        _heard(said)
        if len(descriptors) == 2 and _is_sealed(descriptors[0], area_bytes(slot_bytes)):
            with contextlib.suppress(OSError):  # it may not be written, or the other is no socket
                memory = mmap.mmap(descriptors[0], area_bytes(slot_bytes))
                credits = socket.socket(fileno=descriptors[1])
                descriptors.pop()
                area = Area(memory, credits, slot_bytes, first=False)
    finally:
        for descriptor in descriptors:
            os.close(descriptor)
    sock.send(_NO if area is None else _YES)
    return area


def _heard(said: bytes) -> bytes:
    if not said:
        raise ConnectionResetError("its link was closed")
    return said


def _sealed_memory(nbytes: int) -> tuple[int, mmap.mmap]:
    """Memory of a size that nobody can change, and its descriptor; all of it is there, or OSError is raised."""
    descriptor = os.memfd_create("ringlm", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        return descriptor, mmap.mmap(descriptor, nbytes)
    except BaseException:
        os.close(descriptor)
        raise


def _is_sealed(descriptor: int, nbytes: int) -> bool:
    """Whether this is memory of just that size, for ever: to touch what has been cut off would kill the process."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:  # something else than memory
        return False
    return bool(seals & fcntl.F_SEAL_SHRINK) and os.fstat(descriptor).st_size == nbytes
