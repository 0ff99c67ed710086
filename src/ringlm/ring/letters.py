"""Messages from one rank to another, with tags: `send` and `recv`.

They share the links with the collectives, so a letter may arrive while its receiver is in something
else: then it goes to the link's mailbox (`lane.Lane`), where `fetch` looks first.
"""

from __future__ import annotations

from collections.abc import Mapping

from ringlm.ring import wire
from ringlm.ring.lane import Lane, Patience
from ringlm.ring.mesh import Mesh


def post(mesh: Mesh, to: int, data: memoryview, call: bytes, deadline: float) -> None:
    """Send; and take letters meanwhile, since the receiver may be sending too, and wait for this rank."""
    lane = mesh.lane(to, call)
    lane.send(data)
    wait = Patience(deadline)
    while True:
        head = b"" if lane.receiving else _head(lane)
        if head and wire.is_letter(head):
            lane.receive_letter(head)
        moved = lane.move()
        if not lane.sending and not lane.receiving:
            return
        if moved:
            wait.restart()
        else:
            wait.turn([(lane.link, lane.receiving or not head, lane.sending)], lane.link)


def fetch(mesh: Mesh, calls: Mapping[int, bytes], into: memoryview, deadline: float) -> int:
    """Fill `into` with the first letter that is one of `calls`, by source; the rank it came from.

    Raises DesyncError for a letter of the right tag and another size or dtype, and where something else
    than a letter comes from the only source.
    """
    lanes = {source: mesh.lane(source, call) for source, call in calls.items()}
    wait = Patience(deadline)
    got: list[int] = []
    promised = False  # a letter is here, or on its way to its place
    while True:
        busy = set()  # links on which something else than a letter waits for another call
        for source, lane in lanes.items():
            if promised or lane.receiving:
                continue
            if _from_mailbox(lane, calls[source], into):
                got.append(source)
                promised = True
            elif head := _head(lane):
                if not wire.is_letter(head):
                    if len(lanes) == 1:
                        raise lane.desync(head)
                    busy.add(source)
                elif _answers(lane, head, calls[source]):
                    lane.receive(into, then=lambda source=source: got.append(source))  # type: ignore[misc]
                    promised = True
                else:
                    lane.receive_letter(head)
        moved = False
        for lane in lanes.values():
            moved |= lane.move()
        behind = [lane.link for lane in lanes.values() if lane.receiving]
        if got and not behind:
            return got[0]
        if moved:
            wait.restart()
        else:
            listening = [lane.link for source, lane in lanes.items() if source not in busy]
            late = (behind or [lane.link for lane in lanes.values()])[0]
            wait.turn([(link, True, False) for link in (behind if promised else listening)], late)


def _head(lane: Lane) -> bytes:
    """The call that comes next on a link that is between messages, if it is here."""
    head = lane.link.peek()
    if len(head) < wire.CALL_BYTES:
        return b""
    if not wire.intact(head):
        raise lane.link.damaged(head)
    return head


def _from_mailbox(lane: Lane, call: bytes, into: memoryview) -> bool:
    mailbox = lane.link.mailbox
    for letter in mailbox.letters:
        if _answers(lane, letter.call, call):
            into[:] = mailbox.take(letter)
            return True
    return False


def _answers(lane: Lane, theirs: bytes, call: bytes) -> bool:
    """Whether a letter has the tag and the group that `call` asks for; the rest must be equal too then."""
    letter, wanted = wire.Call.unpack(theirs), wire.Call.unpack(call)
    if (letter.sequence, letter.group) != (wanted.sequence, wanted.group):
        return False
    if theirs != call:
        raise lane.desync(theirs)
    return True
