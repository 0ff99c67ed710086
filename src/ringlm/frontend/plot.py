"""Pictures of what `ringlm bench` and `ringlm bench comm` measure. matplotlib is loaded when there is one to draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ringlm.cluster.comm_bench import Row
from ringlm.errors import ConfigError


def check(path: Path) -> None:
    """Raises ConfigError where `draw` could not write `path`."""
    if path.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"--plot {path} is neither PNG nor SVG; give a name that ends in .png or .svg.")
    if not path.parent.is_dir():
        raise ConfigError(f"--plot {path}: there is no folder {path.parent}; make it first.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'ringlm[plot]', or leave it out.")


def draw(rows: list[Row], path: Path) -> None:
    """Median microseconds over bytes, both logarithmic; a line for each backend and world size, from the median up to
    the 90th percentile. Raises ConfigError where `path` cannot be written."""
    figure, (axes,) = _figure(1)
    styles = {"ring": "-", "gloo": "--", "nccl": ":"}
    world_sizes = sorted({row["world_size"] for row in rows})
    for backend, world_size in sorted({(row["backend"], row["world_size"]) for row in rows}):
        line = sorted(
            (row for row in rows if (row["backend"], row["world_size"]) == (backend, world_size)),
            key=lambda row: row["bytes"],
        )
        sizes, medians = [row["bytes"] for row in line], [row["us_p50"] for row in line]
        colour = f"C{world_sizes.index(world_size) % 10}"
        axes.plot(sizes, medians, styles[backend], color=colour, marker="o", label=f"{backend}, {world_size} ranks")
        axes.fill_between(sizes, medians, [row["us_p90"] for row in line], color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="bytes", ylabel="microseconds, median to 90th percentile")
    axes.set_title(f"all-reduce, {rows[0]['dtype']}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_load(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Throughput beside latency, both over the requests at the same time: a line for each test, and for each latency
    its median up to the 90th percentile. Raises ConfigError where `path` cannot be written."""
    figure, (throughput, latency) = _figure(2)
    for number, test in enumerate(dict.fromkeys(row["test"] for row in rows)):
        line = sorted((row for row in rows if row["test"] == test), key=lambda row: row["concurrency"])
        sizes = [row["concurrency"] for row in line]
        throughput.plot(sizes, [row["tokens_per_s"] for row in line], marker="o", color=f"C{number}", label=test)
        for name, style, what in (("ttft_ms", "-", "first token"), ("inter_token_ms", "--", "next token")):
            if f"{name}_p50" in line[0]:
                medians, nineties = ([row[f"{name}_{share}"] for row in line] for share in ("p50", "p90"))
                latency.plot(sizes, medians, style, marker="o", color=f"C{number}", label=f"{test}, {what}")
                latency.fill_between(sizes, medians, nineties, color=f"C{number}", alpha=0.15, linewidth=0)
    throughput.set(xlabel="requests at the same time", ylabel="tokens per second")
    throughput.set_ylim(bottom=0)
    latency.set(xlabel="requests at the same time", ylabel="milliseconds, median to 90th percentile")
    latency.set_yscale("log")
    latency.yaxis.set_major_formatter("{x:g}")
    latency.yaxis.set_minor_formatter("{x:g}")
    for axes in (throughput, latency):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["concurrency"] for row in rows}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.suptitle(title)
    _save(figure, path)


def _figure(columns: int) -> tuple[Any, Any]:
    """A figure and its axes, side by side."""
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(3 + 5 * columns, 5), layout="constrained", squeeze=False)
    return figure, axes[0]


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from error
    finally:
        pyplot.close(figure)
