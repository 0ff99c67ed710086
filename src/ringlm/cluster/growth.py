"""When a ring that has lost ranks may be ended for a larger one: rarer and rarer where that keeps failing, since all
requests wait meanwhile. Knows no ranks."""

from __future__ import annotations

import math
import time
from typing import Final

PAUSE_S: Final = 30.0  # from one attempt to the next
_LONGEST_PAUSE_S: Final = 960.0
_HELD_S: Final = 60.0  # a ring that has worked so long has held


class Growth:
    """Of one ring after the other. `under_way`: the next one is to be larger, or this one is and has not held yet."""

    def __init__(self) -> None:
        self.under_way = False
        self._due, self._pause_s = 0.0, PAUSE_S
        self._ready = math.inf  # when the last ring was

    @property
    def due(self) -> bool:
        """Whether it may be tried now."""
        return time.monotonic() >= self._due

    def tried(self, begins: bool) -> None:
        """It was considered, and perhaps the ring ends for it."""
        self._due = time.monotonic() + self._pause_s
        if begins:
            self.under_way, self._ready, self._pause_s = True, math.inf, min(2 * self._pause_s, _LONGEST_PAUSE_S)

    def formed(self) -> None:
        """A ring is ready."""
        self._ready = time.monotonic()

    def ended(self, broken: bool) -> bool:
        """The ring has ended, perhaps `broken`, or could not be formed; whether because it was to grow."""
        hasty = self.under_way and not (broken and time.monotonic() - self._ready > _HELD_S)
        self.under_way = hasty and not broken
        if broken and not hasty:
            self._pause_s = PAUSE_S
        return hasty
