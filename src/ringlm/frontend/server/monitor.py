"""Watches the engine for those who ask about it: has it ended, how does it do, how fast is it. Knows no HTTP."""

from __future__ import annotations

import asyncio
import time

from ringlm.cluster.messages import Stats
from ringlm.errors import RingLMError
from ringlm.frontend.metrics import Metrics
from ringlm.frontend.session import Session

PERIOD_S = 0.5
RATE_S = 10.0  # a rate is told for so long after its figures


class Monitor:
    """`rate` is tokens per second, of all answers together, between the engine's two newest figures."""

    def __init__(self, session: Session, metrics: Metrics) -> None:
        self._session = session
        self._metrics = metrics
        self._stats: Stats | None = None
        self._at = 0.0  # when they came
        self._rate = 0.0

    @property
    def tokens_per_s(self) -> float:
        """0 while nothing is written."""
        return self._rate if time.monotonic() - self._at < RATE_S else 0.0

    async def failure(self) -> RingLMError:
        """What has ended the engine, once something has."""
        while self._session.failure is None:
            self.look()
            await asyncio.sleep(PERIOD_S)
        return self._session.failure

    def look(self) -> None:
        """Take the engine's newest figures."""
        stats = self._session.stats()
        if stats is None or stats is self._stats:
            return
        now = time.monotonic()
        if self._stats is not None:
            self._rate = (stats.generated_tokens - self._stats.generated_tokens) / (now - self._at)
        self._stats, self._at = stats, now
        self._metrics.update(stats)
