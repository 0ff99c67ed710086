"""A data link: one connection to one peer, and its memory for what comes.

What it does not know: what the bytes of a frame mean, and messages of many frames (`lane`).
"""

from __future__ import annotations

import socket

import torch

from ringlm.errors import PeerLostError
from ringlm.ring import wire
from ringlm.ring.mailbox import Mailbox
from ringlm.ring.seal import TAG_BYTES, Connection
from ringlm.ring.shared import Area
from ringlm.ring.wire import CALL_BYTES, HEADER_BYTES

_NOW = socket.MSG_DONTWAIT
_MAX_SLICES = 64


class Link:
    """A tuned connection to rank `peer`, which `name` names in errors, and the memory shared with it, if any."""

    __slots__ = ("_scratch", "_slices", "area", "header", "mailbox", "name", "peer", "received", "seal", "sent", "sock")

    def __init__(self, connection: Connection, peer: int, name: str, area: Area | None = None) -> None:
        self.sock, self.seal = connection
        self.area = area
        self.peer = peer
        self.name = name
        self.sent = self.received = 0  # bytes, those of headers included
        # Of the frame under way: its call, and what tells whether it is whole
        self.header = bytearray(HEADER_BYTES if self.seal is None else CALL_BYTES + TAG_BYTES)
        self.mailbox = Mailbox()
        self._scratch: torch.Tensor | None = None
        self._slices: dict[tuple[torch.dtype, int], tuple[torch.Tensor, memoryview]] = {}

    def scratch(self, dtype: torch.dtype, length: int) -> tuple[torch.Tensor, memoryview]:
        """Memory for `length` elements that this peer sends, as a tensor and as bytes; the same at every call."""
        found = self._slices.get((dtype, length))
        if found is None:
            nbytes = length * dtype.itemsize
            if len(self._slices) >= _MAX_SLICES:
                self._slices.clear()
            if self._scratch is None or self._scratch.nbytes < nbytes:
                self._scratch = torch.empty(nbytes, dtype=torch.uint8)
                self._slices.clear()
            tensor = self._scratch[:nbytes].view(dtype)
            found = self._slices[dtype, length] = tensor, wire.view(tensor)
        return found

    def lost(self, error: OSError | None = None) -> PeerLostError:
        """The error for a connection that has ended."""
        how = f"broke: {error.strerror or error}" if error is not None else "was closed"
        return PeerLostError(f"{self.name} is lost: its link {how}.", self.peer)

    def damaged(self, call: bytes | bytearray) -> PeerLostError:
        """The error for bytes that are not those which the peer sent."""
        return PeerLostError(
            f"{self.name} is lost: its link damages what it carries; the checksum of a frame was wrong "
            f"in {wire.describe(call)}. Look at the cable, the switch and the memory of both machines.",
            self.peer,
        )

    def shut(self) -> None:
        """End both directions, waking whoever waits on this link; safe from another thread."""
        if self.area is not None:
            self.area.shut()
        try:
            self.sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # it has ended already

    def close(self) -> None:
        """Give back what it holds."""
        self.sock.close()
        if self.area is not None:
            self.area.close()

    def peek(self) -> bytes:
        """The call that comes next, left where it is; fewer bytes where it has not come whole."""
        try:
            head = self.sock.recv(CALL_BYTES, _NOW | socket.MSG_PEEK)
        except BlockingIOError:
            return b""
        except OSError as error:
            raise self.lost(error) from error
        if not head:
            raise self.lost()
        return head
