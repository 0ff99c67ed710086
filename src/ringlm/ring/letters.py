"""Messages from one rank to another, with tags: `send` and `recv`.

They share the links with the collectives, so a letter may arrive while its receiver is in something
else: the link's mailbox (`mailbox.py`) knows where it goes. Who sends or awaits one takes those of all others
meanwhile, since their senders may be what it waits for.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Collection

import torch

from ringlm.errors import PeerLostError
from ringlm.ring import wire
from ringlm.ring.background import Handle
from ringlm.ring.calls import Calls
from ringlm.ring.lane import Lane
from ringlm.ring.link import Link
from ringlm.ring.mailbox import Wanted
from ringlm.ring.mesh import Mesh
from ringlm.ring.patience import Patience
from ringlm.ring.wire import Operation, pack_call


class Letters(Calls):
    """`send` and `recv` between the ranks of a group."""

    def send(self, tensor: torch.Tensor, to: int, tag: int = 0) -> None:
        """Send `tensor` to rank `to`, whose `recv` names the same tag; returns once it is on its way."""
        self._check_peer(to)
        (flat,) = self._staging.take([tensor])
        call = self._letter(flat, self.rank, tag)
        self._guard(call, post, self._mesh, to, wire.view(flat))

    def recv(self, tensor: torch.Tensor, source: int | None = None, tag: int = 0) -> int:
        """Overwrite `tensor` with what rank `source`, or any, sends with this tag; the rank it came from.

        Letters of one rank with one tag arrive in the order in which they were sent.
        """
        here: list[int] = []
        call, wanted = self._want(tensor, source, tag, lambda: here.append(0))

        def move(call: bytes, deadline: float) -> None:
            want(self._mesh, wanted)
            fetch(self._mesh, wanted, lambda: bool(here), deadline)

        self._guard(call, move)
        return self._received(tensor, wanted)

    def expect(self, tensor: torch.Tensor, source: int | None = None, tag: int = 0) -> Handle[int]:
        """`recv` that waits for its letter beside all that is submitted: what follows it need not wait for it."""
        handle: Handle[int] = Handle()

        def begin() -> None:
            try:
                call, wanted = self._want(
                    tensor, source, tag, lambda: handle.finish(lambda: self._received(tensor, wanted))
                )
                self._guard(call, lambda _, __: want(self._mesh, wanted))
            except BaseException as error:  # noqa: BLE001  it is raised where it is waited for
                handle.fail(error)

        self._ring.expects(handle)
        self._ring.submit(begin)
        return handle

    def _letter(self, flat: torch.Tensor, source: int, tag: int) -> bytes:
        """The call of a letter, which is about to be made."""
        self._ring.settle_down()
        if not 0 <= tag < 1 << 64:
            raise ValueError(f"tag is {tag}; a tag is a number from 0, of 64 bits at most.")
        code = self._code(flat.dtype)
        return pack_call(tag, self._ring.epoch, self._group, Operation.SEND, code, 0, source, flat.nbytes)

    def _want(
        self, tensor: torch.Tensor, source: int | None, tag: int, arrived: Callable[[], None]
    ) -> tuple[bytes, Wanted]:
        """A receive into `tensor`, or into host memory for it, and its call."""
        if source is not None or not self._others:
            self._check_peer(self.rank if source is None else source)
        (flat,) = self._staging.take([tensor], read=False)
        calls = {peer: self._letter(flat, peer, tag) for peer in (self._others if source is None else (source,))}
        return next(iter(calls.values())), Wanted(calls, flat, arrived)

    def _received(self, tensor: torch.Tensor, wanted: Wanted) -> int:
        """The letter in its place; whose it was."""
        self._staging.give(tensor, wanted.flat)
        assert wanted.source is not None
        return wanted.source

    def _check_peer(self, rank: int) -> None:
        if rank not in self._mesh.links:
            raise ValueError(f"rank {self.rank} of {self.world_size} has no peer of rank {rank}.")


def post(mesh: Mesh, to: int, data: memoryview, call: bytes, deadline: float) -> None:
    """Send to rank `to`."""
    lanes = mesh.lanes(call)
    lanes[to].send(data)
    late = mesh.links[to]
    _attend(list(lanes.values()), deadline, lambda: not lanes[to].sending, lambda link: link is late, late)


def want(mesh: Mesh, wanted: Wanted) -> None:
    """Give `wanted` the first letter that is here, or tell the mailboxes who waits for it.

    Raises DesyncError for one of the right tag and another size or dtype.
    """
    for source, call in wanted.calls.items():
        mailbox = mesh.links[source].mailbox
        letter = mailbox.find(call)
        if letter is not None:
            if letter.call != call:
                raise mesh.lane(source, call).desync(letter.call)
            wanted.into[:] = mailbox.take(letter)
            wanted.source = source
            wanted.arrived()
            return
    for source in wanted.calls:
        mesh.links[source].mailbox.wanted.append((wanted, source))


def fetch(mesh: Mesh, wanted: Wanted, arrived: Callable[[], bool], deadline: float) -> None:
    """Wait until the letter that was wanted has `arrived`.

    Raises DesyncError where something else than a letter comes from the only source.
    """
    source, call = next(iter(wanted.calls.items()))
    late, only = mesh.links[source], len(wanted.calls) == 1
    lanes = list(mesh.lanes(call).values())
    _attend(lanes, deadline, arrived, lambda link: only and link is late, late, strict=True)


def attend(links: Collection[Link], frame_bytes: int, rank: int, awake: socket.socket) -> None:
    """Take letters as they come, until none is wanted, or something has come to `awake`, which is read.

    Raises PeerLostError where one that is wanted can come no more.
    """
    if not links:
        return
    woken = False

    def done() -> bool:
        nonlocal woken
        with contextlib.suppress(BlockingIOError):
            woken = bool(awake.recv(64)) or woken
        return woken or not any(link.mailbox.waiting() for link in links)

    def needed(link: Link) -> bool:
        return any(len(wanted.calls) == 1 for wanted in link.mailbox.waiting())

    lanes = [Lane(link, b"", frame_bytes, rank) for link in links]
    _attend(lanes, float("inf"), done, needed, lanes[0].link, awake=awake)


def _attend(
    lanes: list[Lane],
    deadline: float,
    done: Callable[[], bool],
    needed: Callable[[Link], bool],
    late: Link,
    *,
    strict: bool = False,
    awake: socket.socket | None = None,
) -> None:
    """Send what the lanes hold and take letters, until `done` and no letter is here in part. `late` is who is named at
    the deadline. A link that has ended is forgotten, unless it is `needed`; with `strict` nothing but letters may come
    from those that are."""
    wait = Patience(deadline, awake)
    while True:
        moved = False
        for lane in lanes:
            moved |= lane.move()
        whole = not any(lane.receiving for lane in lanes)
        if moved and not whole:
            wait.restart()
            continue
        ended = done()
        if ended and whole:
            return
        busy = lanes if ended else _begin(lanes, needed, strict)
        wait.turn([(lane.link, lane.receiving or lane not in busy, lane.sending) for lane in lanes], late)


def _begin(lanes: list[Lane], needed: Callable[[Link], bool], strict: bool) -> list[Lane]:
    """Begin with the letters that have come; the lanes where something else waits, for another call."""
    busy = []
    for lane in list(lanes):
        if lane.receiving:
            continue
        try:
            head = lane.link.peek()
        except PeerLostError:
            if needed(lane.link) or len(lanes) == 1:
                raise
            lanes.remove(lane)
            continue
        if len(head) < wire.CALL_BYTES:
            continue
        if not wire.intact(head):
            raise lane.link.damaged(head)
        if wire.is_letter(head):
            lane.receive_letter(head)
        elif strict and needed(lane.link):
            raise lane.desync(head)
        else:
            busy.append(lane)
    return busy
