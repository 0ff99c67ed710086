"""What Prometheus is told of requests and of the engine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse

from ringlm.cluster.messages import LinkStats, RankReport, Ready, Stats
from ringlm.frontend import metrics as module
from ringlm.frontend.metrics import Metrics

ROOT = Path(__file__).parents[2]
STATS = Stats(
    running=3, waiting=2, blocks=100, blocks_in_use=40, blocks_cached=10, steps=7, prompt_tokens=500,
    cached_tokens=200, generated_tokens=60, preemptions=1, step_s=2.5, ring_s=0.5,
    links=[LinkStats(1, 1000, 2000, 0.001), LinkStats(2, 10, 20)],
)  # fmt: skip


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(Ready("tiny", 3, 64, 100, [], "float32", "int4", [RankReport("cpu", 1, 100, 200)] * 3))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def samples(metrics: Metrics) -> dict[str, float]:
    """Every sample by its name, with the values of its labels in the order of their names."""
    return {
        ",".join([sample.name, *(value for _, value in sorted(sample.labels.items()))]): sample.value
        for family in parse(metrics.exposition()[0].decode())
        for sample in family.samples
    }


def test_a_request_is_timed_from_its_arrival(metrics: Metrics, clock: list[float]) -> None:
    request = metrics.started()
    for wait_s, count in ((0.4, 1), (0.02, 1), (0.06, 2)):
        clock[0] += wait_s
        request.tokens(count)
    request.finished("length", queue_s=0.3)
    seen = samples(metrics)
    assert seen["ringlm_time_to_first_token_seconds_sum"] == pytest.approx(0.4)
    assert seen["ringlm_inter_token_seconds_count"] == 3
    assert seen["ringlm_inter_token_seconds_sum"] == pytest.approx(0.08)
    assert seen["ringlm_inter_token_seconds_bucket,0.025"] == 1
    assert seen["ringlm_inter_token_seconds_bucket,0.05"] == 3
    assert seen["ringlm_queue_seconds_sum"] == pytest.approx(0.3)
    assert seen["ringlm_request_seconds_sum"] == pytest.approx(0.48)
    assert (seen["ringlm_requests_total,length"], seen["ringlm_requests_total,stop"]) == (1, 0)


def test_answers_to_one_prompt_are_timed_apart(metrics: Metrics, clock: list[float]) -> None:
    request = metrics.started()
    for wait_s, index in ((0.1, 0), (0.1, 1), (0.1, 0), (0.1, 1)):
        clock[0] += wait_s
        request.tokens(1, index)
    seen = samples(metrics)
    assert seen["ringlm_time_to_first_token_seconds_count"] == 1
    assert seen["ringlm_inter_token_seconds_count"] == 2
    assert seen["ringlm_inter_token_seconds_sum"] == pytest.approx(0.4)


def test_errors_are_counted_by_kind(metrics: Metrics) -> None:
    metrics.started().failed("RequestError")
    metrics.failed("RequestError")
    metrics.failed("QueueFullError")
    seen = samples(metrics)
    assert (seen["ringlm_errors_total,RequestError"], seen["ringlm_errors_total,QueueFullError"]) == (2, 1)
    assert seen["ringlm_request_seconds_count"] == 1


def test_the_engines_figures_are_shown_as_they_are(metrics: Metrics) -> None:
    metrics.update(None)
    assert "ringlm_steps_total" not in samples(metrics)
    metrics.update(STATS)
    metrics.update(STATS)
    seen = samples(metrics)
    expected = {
        "ringlm_requests_running": 3, "ringlm_requests_waiting": 2, "ringlm_cache_blocks": 100,
        "ringlm_cache_blocks_in_use": 40, "ringlm_cache_blocks_cached": 10, "ringlm_steps_total": 7,
        "ringlm_prompt_tokens_total": 500, "ringlm_cached_tokens_total": 200, "ringlm_generated_tokens_total": 60,
        "ringlm_preemptions_total": 1, "ringlm_step_seconds_total": 2.5, "ringlm_ring_seconds_total": 0.5,
        "ringlm_link_bytes_total,sent,1": 1000, "ringlm_link_bytes_total,received,1": 2000,
        "ringlm_link_bytes_total,sent,2": 10, "ringlm_link_round_trip_seconds,1": 0.001,
    }  # fmt: skip
    assert expected.items() <= seen.items()
    assert "ringlm_link_round_trip_seconds,2" not in seen


def test_openmetrics_where_it_is_asked_for(metrics: Metrics) -> None:
    metrics.update(STATS)
    text, content_type = metrics.exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text; version=1.0.0")
    assert "ringlm_steps" in {family.name for family in parse_openmetrics(text.decode())}
    assert metrics.exposition("text/html")[1].startswith("text/plain; version=0.0.4")


def families(metrics: Metrics) -> set[str]:
    """Names as the documents have them: a counter's with _total, the others' as they are."""
    metrics.update(STATS)
    return {
        family.name + {"counter": "_total"}.get(family.type, "")
        for family in parse(metrics.exposition()[0].decode())
        if not family.name.endswith("_created")
    }


def test_two_servers_in_one_process_count_apart(metrics: Metrics) -> None:
    other = Metrics(Ready("other", 1, 64, 100, [], "float32", "none", []))
    metrics.failed("RequestError")
    assert "ringlm_errors_total,RequestError" not in samples(other)


def test_the_documents_name_the_families_that_there_are(metrics: Metrics) -> None:
    there = families(metrics)
    lines = (ROOT / "docs/metrics.md").read_text().splitlines()
    named = " ".join(line.split("|")[1] for line in lines if line.startswith("| `"))
    assert set(re.findall(r"ringlm_\w+", named)) == there
    dashboard = json.loads((ROOT / "examples/grafana/ringlm.json").read_text())
    shown = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    assert {name.removesuffix("_bucket") for name in re.findall(r"ringlm_\w+", shown)} == there - {"ringlm_info"}
