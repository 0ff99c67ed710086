"""A picture of all-reduce times, for `ringlm bench comm --plot`. matplotlib is loaded when there is one to draw."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
    import matplotlib

    matplotlib.use("Agg")  # no window, no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
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
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise ConfigError(f"--plot {path} cannot be written: {error.strerror}.") from error
    finally:
        pyplot.close(figure)
