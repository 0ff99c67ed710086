"""`ringlm bench comm`: what an all-reduce costs on this machine, by size, beside gloo or NCCL. Needs no model."""

from __future__ import annotations

import itertools

from ringlm.cluster.comm_bench import Plan, Row, measure
from ringlm.errors import ConfigError
from ringlm.frontend import console, plot
from ringlm.frontend.command_options import CommOptions
from ringlm.ring.algorithms import Topology, table
from ringlm.ring.config import RingConfig

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def bench_comm(options: CommOptions) -> None:
    """The whole command. Raises ConfigError and RingError."""
    plan = Plan(
        sizes=_distinct("--sizes", [_size(text) for text in options.sizes.split(",")]),
        world_sizes=_distinct("--world-size", [_count(text) for text in options.world_size.split(",")]),
        dtype=options.dtype,
        device=options.device or ("cuda" if options.against == "nccl" else "cpu"),
        against=options.against,
        seconds=options.seconds,
    )
    if options.algorithms:
        show_algorithms(plan.world_sizes)
        return
    if RingConfig.present():
        raise ConfigError("bench comm starts its ranks itself; run it without launch, and unset RING_* or torchrun's.")
    if options.plot is not None:
        plot.check(options.plot)  # better now than after minutes
    with console.progress("measuring", plan.blocks) as advance:
        rows = measure(plan, advance)
    if options.plot is not None:
        plot.draw(rows, options.plot)
    if options.json:
        import json

        print(json.dumps({"rows": rows}), flush=True)
    else:
        show(plan, rows)


def show(plan: Plan, rows: list[Row]) -> None:
    """A line for each world size and size, in 80 columns; with `plan.against` its median beside the ring's."""
    columns = ["ranks", "bytes", "algorithm", "ring us", "p90", "GB/s"]
    if plan.against is not None:
        columns += [f"{plan.against} us", "ratio"]
    lines = []
    for start in range(0, len(rows), len(plan.backends)):
        ours, *theirs = rows[start : start + len(plan.backends)]
        line = [str(ours["world_size"]), _short(ours["bytes"]), ours["algorithm"]]
        line += [f"{ours['us_p50']:,.1f}", f"{ours['us_p90']:,.1f}", f"{ours['gb_per_s']:.2f}"]
        for row in theirs:
            line += [f"{row['us_p50']:,.1f}", f"{row['us_p50'] / ours['us_p50']:.1f}x"]
        lines.append(line)
    console.table(f"all-reduce, {plan.dtype}, {plan.device}, one thread a rank; medians", columns, lines)


def show_algorithms(world_sizes: tuple[int, ...]) -> None:
    """`ringlm.ring.algorithms` as text: what carries what, without a run."""
    topologies: tuple[Topology, ...] = ("mesh", "chain")
    for world_size, topology in itertools.product(world_sizes, topologies):
        if world_size == 2 and topology == "chain":
            continue  # there are no others to go by way of
        console.write(f"{world_size} ranks, {topology}\n")
        for operation, nbytes, algorithm in table(world_size, topology):
            size = "any size" if nbytes is None else f"to {nbytes:,} bytes"
            console.write(f"    {operation:15} {size:18} {algorithm}\n")


def _size(text: str) -> int:
    """Bytes from 6K, 32M or a plain number."""
    unit = _UNITS.get(text[-1:].upper(), 1)
    digits = text[:-1] if unit > 1 else text
    if not (digits.isascii() and digits.isdigit()):
        raise ConfigError(f"--sizes holds '{text}'; write numbers of bytes, such as 6K or 32M.")
    return int(digits) * unit


def _short(nbytes: int) -> str:
    """As --sizes takes it: 6K rather than 6144."""
    unit = next((name for name in ("G", "M", "K") if nbytes % _UNITS[name] == 0), "")
    return f"{nbytes // _UNITS.get(unit, 1)}{unit}"


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ConfigError(f"--world-size holds '{text}'; write numbers of ranks, such as 2,3,4.")
    return int(text)


def _distinct(option: str, values: list[int]) -> tuple[int, ...]:
    if len(set(values)) < len(values):
        raise ConfigError(f"{option} has a number twice; give different numbers.")
    return tuple(values)
