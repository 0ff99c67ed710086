"""What connections may cost that have not said who they are, or are not wanted: a share of the interpreter's time, and
memory, however many come.

A thread that is awake again and again holds up the decode loop beside it, so a crowd is looked at now and then. What it
does not know: what they say.
"""

from __future__ import annotations

import ipaddress
import time
from collections import Counter
from collections.abc import Mapping
from typing import Final, TypeVar

LOOK_S: Final = 0.0025  # for which a crowd is looked at,
PAUSE_S: Final = 0.05  # and how long after that again
_BURST: Final = 20  # turned away before they are a crowd
_RATE: Final = 10.0  # turned away a second without being one

_Key = TypeVar("_Key")


class Crowd:
    """Whether more are turned away than can be looked at as they come."""

    def __init__(self) -> None:
        self._credit = float(_BURST)
        self._since = time.monotonic()
        self.untold = 0  # turned away without a line in the log

    def turned_away(self) -> None:
        """One more."""
        self._credit = max(-_BURST, self._credit - 1)

    @property
    def here(self) -> bool:
        """Whether there is one now."""
        now = time.monotonic()
        self._credit = min(_BURST, self._credit + _RATE * (now - self._since))
        self._since = now
        return self._credit < 0


def source(host: str) -> str:
    """Who is at an address, as far as it shows: an IPv6 network of 64 bits is one machine's to spend."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    return host if address.version == 4 else str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))


def gives_way(waiting: Mapping[_Key, str]) -> _Key:
    """Which of those that wait, oldest first, with their sources, makes room: the oldest of the busiest source."""
    busiest, _ = Counter(waiting.values()).most_common(1)[0]
    return next(key for key, source in waiting.items() if source == busiest)
