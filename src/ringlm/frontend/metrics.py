"""What a server tells Prometheus: families named ringlm_*. Knows no HTTP.

Requests are watched as they go, by whoever serves them; the engine's figures are those of its newest `Stats`.
docs/metrics.md has the table of families.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, Info
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ringlm import __version__
from ringlm.cluster.messages import Ready, Stats
from ringlm.engine.request import StopReason

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)

_FAMILIES: Final = (  # of Stats: what they are called, what they mean, the field
    (GaugeMetricFamily, "requests_running", "Requests in the batch.", "running"),
    (GaugeMetricFamily, "requests_waiting", "Requests in the queue.", "waiting"),
    (GaugeMetricFamily, "cache_blocks", "Blocks of the cache.", "blocks"),
    (GaugeMetricFamily, "cache_blocks_in_use", "Blocks that requests hold.", "blocks_in_use"),
    (
        GaugeMetricFamily,
        "cache_blocks_cached",
        "Free blocks that hold a prefix which may be asked for.",
        "blocks_cached",
    ),
    (CounterMetricFamily, "prompt_tokens", "Tokens of prompts.", "prompt_tokens"),
    (CounterMetricFamily, "cached_tokens", "Tokens of prompts that were found in the prefix cache.", "cached_tokens"),
    (CounterMetricFamily, "generated_tokens", "Tokens of answers.", "generated_tokens"),
    (CounterMetricFamily, "preemptions", "Requests put back into the queue.", "preemptions"),
    (CounterMetricFamily, "steps", "Steps of the engine.", "steps"),
    (CounterMetricFamily, "step_seconds", "Time within steps.", "step_s"),
    (CounterMetricFamily, "ring_seconds", "Time of steps within collectives, on rank 0.", "ring_s"),
    (CounterMetricFamily, "forward_seconds", "Time of steps within forward passes, on rank 0.", "forward_s"),
    (CounterMetricFamily, "recoveries", "How often the ring was formed again.", "recoveries"),
    (GaugeMetricFamily, "spares", "Ranks that wait to take the place of a lost one.", "spares"),
)


class Metrics:
    """All families of one server, in a registry of its own. Any thread may call it."""

    def __init__(self, ready: Ready) -> None:
        self._registry = CollectorRegistry()
        self._engine = _Engine()
        self._registry.register(self._engine)
        info = Info("ringlm", "What is served, by which version.", registry=self._registry)
        info.info(
            {
                "version": __version__,
                "model": ready.model,
                "world_size": str(ready.world_size),
                "dtype": ready.dtype,
                "quant": ready.quant,
            }
        )
        self.first_token_s = self._histogram("time_to_first_token", "From a request's arrival to its first token.")
        self.inter_token_s = self._histogram("inter_token", "Between two tokens of an answer.")
        self.queue_s = self._histogram("queue", "From submission to admission by the scheduler.")
        self.request_s = self._histogram("request", "From a request's arrival to its end.")
        self._requests = Counter(
            "ringlm_requests", "Requests that ended in order, by how.", ["finish_reason"], registry=self._registry
        )
        for reason in StopReason:
            self._requests.labels(str(reason))  # from 0 on, so that the first one shows as a rise
        self._errors = Counter(
            "ringlm_errors", "Requests that failed, by the error's name.", ["kind"], registry=self._registry
        )

    def started(self) -> RequestMetrics:
        """A request has arrived."""
        return RequestMetrics(self)

    def finished(self, finish_reason: str) -> None:
        """Count a request that ended in order; `RequestMetrics.finished` calls it."""
        self._requests.labels(finish_reason).inc()

    def failed(self, kind: str) -> None:
        """Count an error, such as 'QueueFullError'; also of what never became a request."""
        self._errors.labels(kind).inc()

    def update(self, stats: Stats | None) -> None:
        """Show these figures of the engine from here on; None: it has not told any yet."""
        self._engine.stats = stats

    def exposition(self, accept: str = "") -> tuple[bytes, str]:
        """All families as text, and its content type: OpenMetrics where the Accept header asks for it."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type

    def _histogram(self, name: str, meaning: str) -> Histogram:
        return Histogram(f"ringlm_{name}_seconds", meaning, buckets=_SECONDS, registry=self._registry)


class RequestMetrics:
    """One request on its way. Its owner tells what happens to it when it happens."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._started = time.perf_counter()
        self._last: dict[int, float] = {}  # when each answer had its newest token

    def tokens(self, count: int = 1, index: int = 0) -> None:
        """`count` tokens of answer `index` have come at once; several share the time since the one before them."""
        now = time.perf_counter()
        last = self._last.get(index)
        self._last[index] = now
        if last is None:
            if len(self._last) == 1:
                self._metrics.first_token_s.observe(now - self._started)
            return
        each = (now - last) / count if count else 0.0
        for _ in range(count):
            self._metrics.inter_token_s.observe(each)

    def finished(self, finish_reason: str, queue_s: float) -> None:
        """It ended in order; `queue_s` as its Completion has it."""
        self._metrics.queue_s.observe(queue_s)
        self._end()
        self._metrics.finished(finish_reason)

    def failed(self, kind: str) -> None:
        """It ended by an error of this name."""
        self._end()
        self._metrics.failed(kind)

    def _end(self) -> None:
        self._metrics.request_s.observe(time.perf_counter() - self._started)


class _Engine(Collector):
    """The engine's own counters, as they are: read when somebody asks, never summed here."""

    def __init__(self) -> None:
        self.stats: Stats | None = None

    def collect(self) -> Iterator[Metric]:
        stats = self.stats
        if stats is None:
            return
        for family, name, meaning, field in _FAMILIES:
            yield family(f"ringlm_{name}", meaning, getattr(stats, field))
        nbytes = CounterMetricFamily(
            "ringlm_link_bytes", "Payload between rank 0 and another rank.", labels=["rank", "direction"]
        )
        round_trip = GaugeMetricFamily(
            "ringlm_link_round_trip_seconds", "The last round trip between rank 0 and another rank.", labels=["rank"]
        )
        for link in stats.links:
            nbytes.add_metric([str(link.rank), "sent"], link.sent_bytes)
            nbytes.add_metric([str(link.rank), "received"], link.received_bytes)
            if link.round_trip_s is not None:
                round_trip.add_metric([str(link.rank)], link.round_trip_s)
        yield nbytes
        yield round_trip
