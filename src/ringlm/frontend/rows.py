"""Rows of `ringlm bench`, of an engine or a server: percentiles and a table. Knows not how they were measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ringlm.errors import ConfigError
from ringlm.frontend import console

_SHARES = (50, 90, 99)


def percentiles(name: str, seconds: Iterable[float]) -> dict[str, float]:
    """`{name}_p50`, `_p90` and `_p99` in milliseconds. Empty where there are no times."""
    ordered = sorted(seconds)
    return {f"{name}_p{share}": percentile(ordered, share) * 1e3 for share in _SHARES if ordered}


def percentile(values: Iterable[float], share: int) -> float:
    """The largest of the lowest `share` percent of the values."""
    ordered = sorted(values)
    return ordered[-(-share * len(ordered) // 100) - 1]


def sizes(text: str) -> list[int]:
    """The numbers of requests at the same time that --concurrency gives."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--concurrency {text} is not a list of different numbers, such as 1,4,16.")
    return numbers


def show(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A line a row; three numbers together are the 50th, 90th and 99th percentile."""
    columns = ["test", "requests", "tokens/s", "ms p50", "ms p90", "first token ms p50/90/99", "next ms p50/90/99"]
    lines = [
        [
            row["test"],
            str(row["concurrency"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['ms_p50']:.2f}",
            f"{row['ms_p90']:.2f}",
            _three(row, "ttft_ms"),
            _three(row, "inter_token_ms"),
        ]
        for row in rows
    ]
    console.table(title, columns, lines)


def _three(row: dict[str, Any], name: str) -> str:
    return "/".join(f"{row[key]:.1f}" for share in _SHARES if (key := f"{name}_p{share}") in row)
