"""Where the letters of one link go: to who waits for them, or here until somebody asks.

What it does not know: how they come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch

from ringlm.ring import wire


class Letter(NamedTuple):
    """A message of a `send` that came before its receiver asked for it."""

    call: bytes
    body: bytearray


class Wanted:
    """A receive that waits: the calls that it takes, by source, host memory for one of them (`flat`, and its bytes
    `into`), and what is done once it has arrived. `source`: whose is coming, or has come."""

    def __init__(self, calls: Mapping[int, bytes], flat: torch.Tensor, arrived: Callable[[], None]) -> None:
        self.calls = calls
        self.flat = flat
        self.into = wire.view(flat)
        self.arrived = arrived
        self.source: int | None = None


class Mailbox:
    """The letters that have come and that nobody has asked for yet, `limit` bytes of them at most, and in `wanted` who
    waits for one, with the number that this link's peer has for it, in the order of asking."""

    def __init__(self, limit: int = wire.MAX_MESSAGE_BYTES) -> None:
        self.wanted: list[tuple[Wanted, int]] = []
        self._letters: list[Letter] = []
        self._room = limit

    def waiting(self) -> list[Wanted]:
        """Who waits still: a letter from elsewhere may have come."""
        if self.wanted:
            self.wanted = [(wanted, source) for wanted, source in self.wanted if wanted.source is None]
        return [wanted for wanted, _ in self.wanted]

    def place(self, call: bytes) -> tuple[memoryview, Callable[[], None]]:
        """Memory for a letter that begins to come, and what to do once it has arrived.

        Raises ValueError for one that is not as its receiver wants it, and where nobody does and there is no more room.
        """
        self.waiting()
        for wanted, source in self.wanted:
            if _answers(call, wanted.calls[source]):
                if call != wanted.calls[source]:
                    raise ValueError(f"this rank awaits a {wire.describe(wanted.calls[source])}")
                wanted.source = source
                return wanted.into, wanted.arrived
        nbytes = wire.nbytes(call)
        if nbytes > self._room:
            raise ValueError(f"{nbytes:,} bytes were sent that this rank has not asked for; call recv")
        self._room -= nbytes
        letter = Letter(call, bytearray(nbytes))
        return memoryview(letter.body), partial(self._letters.append, letter)

    def find(self, call: bytes) -> Letter | None:
        """The first letter here of the tag and the group in `call`."""
        return next((letter for letter in self._letters if _answers(letter.call, call)), None)

    def take(self, letter: Letter) -> bytearray:
        """Out of the box."""
        self._letters.remove(letter)
        self._room += len(letter.body)
        return letter.body


def _answers(theirs: bytes, wanted: bytes) -> bool:
    one, other = wire.Call.unpack(theirs), wire.Call.unpack(wanted)
    return (one.sequence, one.group) == (other.sequence, other.group)
