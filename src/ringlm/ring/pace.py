"""Which rank is slow: it computes much longer between two collectives than the others do, and so all wait for it.

Knows what ranks say of themselves, no clocks of its own and no links.
"""

from __future__ import annotations

from collections import deque
from statistics import median
from typing import Final, NamedTuple

WINDOW_S: Final = 10.0
MULTIPLE: Final = 3.0  # of the others' time; shards that are not of one size differ by less
_COLLECTIVES: Final = 100  # fewer than these in the window say nothing


class _Sample(NamedTuple):
    at_s: float
    collectives: int
    computed_s: float


class Paces:
    """What every rank took lately, from its own counters: collectives, and seconds outside of them while it worked."""

    def __init__(self) -> None:
        self._samples: dict[int, deque[_Sample]] = {}

    def observe(self, rank: int, at_s: float, collectives: int, computed_s: float) -> None:
        """`rank` says at `at_s` how many collectives it has been in and how long it has computed, in all."""
        samples = self._samples.setdefault(rank, deque())
        samples.append(_Sample(at_s, collectives, computed_s))
        while len(samples) > 2 and samples[1].at_s <= at_s - WINDOW_S:
            samples.popleft()

    def slow(self) -> dict[int, float]:
        """Ranks that have been slow for the whole window, and how many times as long as the others they took."""
        times = {}
        for rank, samples in self._samples.items():
            first, last = samples[0], samples[-1]
            collectives = last.collectives - first.collectives
            if last.at_s - first.at_s >= WINDOW_S and collectives >= _COLLECTIVES:
                times[rank] = (last.computed_s - first.computed_s) / collectives
        found = {}
        for rank, time_s in times.items():
            others = [other for peer, other in times.items() if peer != rank]
            usual = median(others) if others else 0.0
            if usual > 0 and time_s > MULTIPLE * usual:
                found[rank] = time_s / usual
        return found
