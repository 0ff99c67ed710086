"""Watches the engine for those who ask about it: has it ended, how does it do, how fast is it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time
from typing import NamedTuple

import msgspec

from ringlm.cluster.messages import Stats
from ringlm.errors import RingLMError
from ringlm.frontend.metrics import Metrics
from ringlm.frontend.session import Session

PERIOD_S = 0.5
RATE_S = 10.0  # a rate is told for so long after its figures


class Link(msgspec.Struct, kw_only=True):
    """A data link between two ranks, the lower first: bytes per second to the higher, and back. The round trip is known
    of rank 0's links only."""

    ranks: list[int]
    there_per_s: float
    back_per_s: float
    round_trip_s: float | None


class Step(msgspec.Struct, kw_only=True):
    """A step of the engine, on average: of `seconds`, `ring_s` in collectives."""

    seconds: float
    ring_s: float


class Rates(NamedTuple):
    """How fast it is: tokens of all answers together, a step (None while there is none), all links, rank 0's first."""

    tokens_per_s: float = 0.0
    step: Step | None = None
    links: list[Link] = []  # noqa: RUF012  nobody adds to it


class Monitor:
    """Takes what the engine tells; rates are between its two newest figures."""

    def __init__(self, session: Session, metrics: Metrics) -> None:
        self._session = session
        self._metrics = metrics
        self._before: Stats | None = None
        self._newest: Stats | None = None
        self._at = 0.0  # when they came

    @property
    def rates(self) -> Rates:
        """All of them 0 while nothing is written."""
        if self._newest is None:
            return Rates()
        before = self._before if time.monotonic() - self._at < RATE_S else None
        return _between(before or self._newest, self._newest)

    async def failure(self) -> RingLMError:
        """What has ended the engine, once something has."""
        while self._session.failure is None:
            self.look()
            await asyncio.sleep(PERIOD_S)
        return self._session.failure

    def look(self) -> None:
        """Take the engine's newest figures."""
        stats = self._session.stats()
        if stats is None or stats is self._newest:
            return
        self._before, self._newest, self._at = self._newest, stats, time.monotonic()
        self._metrics.update(stats)


def _between(before: Stats, after: Stats) -> Rates:
    seconds, steps = after.at_s - before.at_s or 1.0, after.steps - before.steps
    trips = {link.rank: link.round_trip_s for link in after.links}
    earlier = _moved(before)
    links = []
    for ranks, moved in _moved(after).items():
        # The links of a ring that was formed again count anew.
        there, back = (max(0, now - then) / seconds for now, then in zip(moved, earlier.get(ranks, moved), strict=True))
        trip = trips.get(ranks[1]) if ranks[0] == 0 else None
        links.append(Link(ranks=list(ranks), there_per_s=there, back_per_s=back, round_trip_s=trip))
    step = None
    if steps:
        step = Step(seconds=(after.step_s - before.step_s) / steps, ring_s=(after.ring_s - before.ring_s) / steps)
    return Rates((after.generated_tokens - before.generated_tokens) / seconds, step, links)


def _moved(stats: Stats) -> dict[tuple[int, int], tuple[int, int]]:
    """By pair of ranks, the lower first: bytes there and back so far."""
    moved = {(0, link.rank): (link.sent_bytes, link.received_bytes) for link in stats.links}
    return moved | {(one, other): (there, back) for one, other, there, back in stats.others}
