"""Messages of any size over several links: lanes of frames.

Both directions move at once and nothing blocks while there is something to do, so no payload can
deadlock. What it does not know: how ranks wait (patience.py), and what the bytes of a frame mean.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence

from ringlm.errors import DesyncError
from ringlm.ring import wire
from ringlm.ring.link import Link
from ringlm.ring.wire import CALL_BYTES

_NOW = socket.MSG_DONTWAIT
_NOTHING = memoryview(bytearray())


class _Expected:
    """A frame to come: which call's, where to (None: not known before its header is here), and what then."""

    __slots__ = ("body", "call", "room", "then")

    def __init__(
        self, call: bytes, body: memoryview | None, then: Callable[[], None] | None, room: Room | None = None
    ) -> None:
        self.call = call
        self.body = body
        self.then = then
        self.room = room


Room = Callable[[int], memoryview]  # memory for a message of that many bytes; ValueError refuses it


class Lane:
    """What one link has yet to send and to receive in a call: two queues of frames.

    `rank` is this rank, for errors.
    """

    __slots__ = (
        "_area",
        "_body",
        "_call",
        "_carry",
        "_frame_bytes",
        "_got",
        "_hashed",
        "_hasher",
        "_head",
        "_head_bytes",
        "_in",
        "_out",
        "_rank",
        "_seal",
        "digest",
        "link",
    )

    def __init__(self, link: Link, call: bytes, frame_bytes: int, rank: int) -> None:
        self.link = link
        self._seal = link.seal
        self._area = link.area
        self._head_bytes = len(link.header)
        self._call = call
        self._frame_bytes = frame_bytes
        self._rank = rank
        self._out: deque[tuple[bytes, memoryview, bytes | None]] = deque()
        self._head = self._body = _NOTHING  # what is left of the frame that is being sent
        self._in: deque[_Expected] = deque()
        self._got = 0  # bytes of the frame that is being received, header included
        self._hasher: wire.Hasher | None = None  # of what has come of its body
        self._hashed = 0
        self.digest = b""  # of the frame that was received last, unless the link is sealed
        self._carry = b""  # received in the place of something else

    # -- what is to be done --------------------------------------------------------------------

    def send(self, body: memoryview, call: bytes | None = None, digest: bytes | None = None) -> None:
        """Queue a message: a frame, or as many as it needs. `body` stays as it is until it is sent; `digest`
        is that of a message of one frame, if it is known."""
        for start in range(0, len(body) or 1, self._frame_bytes):
            self._out.append((call or self._call, body[start : start + self._frame_bytes], digest))

    def resume(self, head: bytes, body: memoryview, sent: int) -> None:
        """Queue a message of one frame of which `sent` bytes have gone."""
        self._head, self._body = memoryview(head)[sent:], body[max(0, sent - self._head_bytes) :]

    def receive_rest(self, body: memoryview, got: int) -> None:
        """Queue memory for a message of one frame of which `got` bytes are in the link's header and in `body`."""
        self.receive(body)
        self._got = got
        if got >= self._head_bytes:
            self._begin()
            self._finish()

    def receive(self, body: memoryview, call: bytes | None = None, then: Callable[[], None] | None = None) -> None:
        """Queue memory to fill with a message of just this size; `then` is called once it is whole and right."""
        length, step = len(body), self._frame_bytes
        for start in range(0, length or 1, step):
            last = start + step >= length
            self._in.append(_Expected(call or self._call, body[start : start + step], then if last else None))

    def receive_sized(self, room: Room) -> None:
        """Queue a message whose size the peer tells; `room` gives it memory."""
        self._in.append(_Expected(self._call, None, None, room))

    def receive_letter(self, call: bytes) -> None:
        """Expect a letter, whose call this is, before all else; the mailbox knows where it goes."""
        try:
            body, arrived = self.link.mailbox.place(call)
        except ValueError as error:
            raise self.desync(call, str(error)) from None
        self._insert(call, body, arrived)

    @property
    def sending(self) -> bool:
        return bool(self._out) or len(self._head) > 0 or len(self._body) > 0

    @property
    def receiving(self) -> bool:
        return bool(self._in)

    # -- doing it ------------------------------------------------------------------------------

    def move(self) -> bool:
        """Send and receive what the kernel takes and has at once; whether any byte moved.

        Raises PeerLostError, also for a damaged frame, or DesyncError.
        """
        sent = self.sending and self._push()
        received = bool(self._in) and self._pull()
        return sent or received

    def _push(self) -> bool:
        """One call: a rank that sends more before it reads lets the peer's bytes grow cold, and is a third slower."""
        if not len(self._head) and not len(self._body):
            call, body, digest = self._out[0]
            if self._area is not None and self._shares(call, body):
                try:
                    if not self._area.put(body):
                        return False
                except OSError as error:
                    raise self.link.lost(error) from error
                self.link.sent += len(body)
                self._head, self._body = memoryview(call + (digest or wire.digest(body))), _NOTHING
            elif self._seal is None:
                self._head, self._body = memoryview(call + (digest or wire.digest(body))), body
            else:
                tag, self._body = self._seal.close(call, body)
                self._head = memoryview(call + tag)
            self._out.popleft()
        try:
            sent = self.link.sock.sendmsg((self._head, self._body), (), _NOW)
        except BlockingIOError:
            return False
        except OSError as error:
            raise self.link.lost(error) from error
        self.link.sent += sent
        head = len(self._head)
        self._head, self._body = self._head[sent:], self._body[max(0, sent - head) :]
        return True

    def _pull(self) -> bool:
        moved, header = False, memoryview(self.link.header)
        try:
            while self._in:
                expected, before = self._in[0], self._got
                body = self._place(expected)
                shared = self._area is not None and self._shares(expected.call, body)
                if before < self._head_bytes:
                    self._got += self._read((header[before:], _NOTHING if shared else body))
                    if self._got >= self._head_bytes:
                        self._begin()
                elif not shared and before < self._head_bytes + len(body):
                    self._got += self._read((body[before - self._head_bytes :],))
                if shared and self._got == self._head_bytes and self._in[0] is expected:
                    self._take(body)
                moved = True
                if not self._finish() and self._got > self._head_bytes and self._seal is None:
                    self._hash_part()
        except BlockingIOError:
            pass
        except OSError as error:
            raise self.link.lost(error) from error
        return moved

    def _take(self, body: memoryview) -> None:
        """A body of which the header is here, from the memory that both ends share."""
        assert self._area is not None
        self._area.take(body)
        self._got += len(body)
        self.link.received += len(body)

    def _read(self, buffers: Sequence[memoryview]) -> int:
        if self._carry:
            done = 0
            for buffer in buffers:
                piece = self._carry[: len(buffer)]
                buffer[: len(piece)] = piece
                self._carry = self._carry[len(piece) :]
                done += len(piece)
            return done
        got = self.link.sock.recvmsg_into(buffers, 0, _NOW)[0]
        if got == 0:
            raise self.link.lost()
        self.link.received += got
        return got

    def _shares(self, call: bytes, body: memoryview) -> bool:
        """Whether a body goes by way of the memory that both ends share: those of messages of many frames do; not
        letters, of which the socket holds more until they are asked for."""
        return len(body) > 0 and wire.nbytes(call) > self._frame_bytes and not wire.is_letter(call)

    def _place(self, expected: _Expected) -> memoryview:
        """Where the body of a frame is to be received."""
        if expected.body is None:
            return _NOTHING
        return expected.body if self._seal is None else self._seal.place(expected.body)

    def _begin(self) -> None:
        """The header is here: is it the one that was expected? A rank compares it before it waits for more."""
        expected = self._in[0]
        theirs = bytes(self.link.header[:CALL_BYTES])
        if expected.body is not None and theirs == expected.call:
            return
        if not wire.intact(theirs):
            raise self.link.damaged(theirs)
        nbytes = wire.Call.unpack(theirs).nbytes
        try:
            if expected.room is not None and wire.same_kind(theirs, expected.call):
                if nbytes > wire.MAX_MESSAGE_BYTES:
                    raise ValueError(f"more than {wire.MAX_MESSAGE_BYTES:,} bytes in one message")
                self._in.popleft()
                self._insert(theirs, expected.room(nbytes), None)
            elif wire.is_letter(theirs):
                if expected.body is not None:  # what was read beyond the header is the letter's, and more
                    self._carry = bytes(self._place(expected)[: self._got - self._head_bytes]) + self._carry
                    self._got = self._head_bytes
                self.receive_letter(theirs)
            else:
                raise self.desync(theirs)
        except ValueError as error:
            raise self.desync(theirs, str(error)) from None

    def _insert(self, call: bytes, body: memoryview, then: Callable[[], None] | None) -> None:
        """Expect a message before all others."""
        waiting = list(self._in)
        self._in.clear()
        self.receive(body, call, then)
        self._in.extend(waiting)

    def _finish(self) -> bool:
        """Go on to the next frame, if this one is here."""
        expected = self._in[0]
        if expected.body is None or self._got < self._head_bytes + len(expected.body):
            return False
        if not self._right(expected.body):
            raise self.link.damaged(expected.call)
        self._in.popleft()
        self._got = 0
        if expected.then is not None:
            expected.then()
        return True

    def _right(self, body: memoryview) -> bool:
        """Whether the frame that has come whole is the one that was sent."""
        header = self.link.header
        if self._seal is not None:
            return self._seal.open(bytes(header[:CALL_BYTES]), header[CALL_BYTES:], body)
        if self._hasher is None:
            self.digest = wire.digest(body)
        else:
            self._hash_part()
            self.digest, self._hasher, self._hashed = self._hasher.digest(), None, 0
        return header[CALL_BYTES:] == self.digest

    def _hash_part(self) -> None:
        """Hash what has come of a body while it is in the cache."""
        body = self._in[0].body
        if body is not None:
            self._hasher = self._hasher or wire.Hasher()
            self._hasher.update(body[self._hashed : self._got - self._head_bytes])
            self._hashed = self._got - self._head_bytes

    def desync(self, theirs: bytes, why: str = "") -> DesyncError:
        """The error for a peer whose header says something else."""
        mine = self._in[0].call if self._in else self._call
        text = wire.mismatch(self._rank, mine, self.link.name, theirs)
        return DesyncError(f"{text} ({why}.)" if why else text, self.link.peer)
