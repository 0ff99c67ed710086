"""Answers of /v1/responses that are kept for those who ask for them again or go on from them. In memory, bounded."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

MAX_BYTES = 64 << 20


class Kept(NamedTuple):
    """An answer, and all items of its conversation with its own, as JSON."""

    response: bytes
    items: bytes

    @property
    def nbytes(self) -> int:
        return len(self.response) + len(self.items)


class ResponseStore:
    """Forgets what has not been used for longest once there are more than `max_bytes`. For one event loop."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._max_bytes = max_bytes
        self._nbytes = 0

    def keep(self, name: str, kept: Kept) -> None:
        self._kept[name] = kept
        self._nbytes += kept.nbytes
        while self._nbytes > self._max_bytes:
            self.drop(next(iter(self._kept)))

    def find(self, name: str) -> Kept | None:
        if name in self._kept:
            self._kept.move_to_end(name)
        return self._kept.get(name)

    def drop(self, name: str) -> bool:
        """Whether it was there."""
        kept = self._kept.pop(name, None)
        self._nbytes -= kept.nbytes if kept is not None else 0
        return kept is not None
