"""Where a decode step's time goes: microseconds by part, on one rank's shard, one thread.

    python benchmarks/step.py [-m demo] [--quant int4] [--world-size 2] [--rank 0] [--position 64] [--json]

The parts run by themselves, layer after layer, so that weights come from memory as they do in a step. Reductions are
left out (`decode.py` shows the ring's share, `ringlm bench comm` what one costs): the ring's other ranks are not there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ringlm.cluster.agreement import BITS
from ringlm.engine.logits import pick
from ringlm.frontend.model import resolve
from ringlm.models.attention import AttentionStep
from ringlm.models.batch import Batch
from ringlm.models.config import read_config
from ringlm.models.layers import Attention, Block
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone
from ringlm.parallel.shard import plan_shards
from ringlm.weights import open_model

TURNS = 31


class Part(NamedTuple):
    """A kind of work in a step: how often it comes, microseconds each time, bytes of weights it reads each time."""

    name: str
    calls: int
    us: float
    nbytes: int


class Absent(Alone):
    """A ring whose other ranks add nothing."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size  # type: ignore[misc]


def timed(name: str, works: Iterable[Callable[[], object]], nbytes: int = 0) -> Part:
    """The median of TURNS turns through all `works`, for one of them."""
    calls = list(works)
    turns = []
    for _ in range(TURNS):
        started = time.perf_counter()
        for work in calls:
            work()
        turns.append(time.perf_counter() - started)
    return Part(name, len(calls), statistics.median(turns) / len(calls) * 1e6, nbytes)


@torch.inference_mode()
def measure(options: argparse.Namespace) -> tuple[list[Part], float]:
    """The parts, and the whole step by itself in microseconds."""
    files = open_model(resolve(options.model).path)
    comm = Absent(options.rank, options.world_size)
    plan = plan_shards(read_config(files.config), options.world_size)
    dtype = torch.float32
    model: Any = load_model(
        files, plan, options.rank, comm, device=torch.device("cpu"), dtype=dtype, context=options.position + 128,
        bits=BITS[options.quant],
    )  # fmt: skip
    cache = model.new_cache(1, options.position + 1)
    model.forward(Batch.of([(list(range(options.position)), 0, [0])], []), cache)
    piece = ([5], options.position, [0])
    batch = Batch.of([piece], [0])
    heads = len(model.shard.query_heads), len(model.shard.kv_heads)
    blocks: list[Block] = model._blocks
    attends: list[Attention] = [block.attention for block in blocks]
    mlps: list[Any] = [block.mlp for block in blocks]
    hidden = model._embedding(batch.tokens)
    step = AttentionStep(batch, cache, model._attention, *heads)
    qkv = attends[0].qkv(hidden).clone().view(1, -1, model.config.head_dim)
    mixed, gates = step(0, attends[0].kind, qkv).clone(), mlps[0].gate_up(hidden).clone()
    logits = model._head(hidden).float()

    def product(name: str, parts: list[Any], layer: str, work: Callable[[Any], object]) -> Part:
        return timed(name, [lambda p=p: work(p) for p in parts], getattr(parts[0], layer).matrix.nbytes)

    parts = [
        timed("batch", [lambda: Batch.of([piece], [0])]),
        timed("embedding", [lambda: model._embedding(batch.tokens)]),
        timed("attention's set-up", [lambda: AttentionStep(batch, cache, model._attention, *heads)]),
        product("norm, qkv", attends, "qkv", lambda a: a.qkv(hidden)),
        timed("rotary, cache, attention", [lambda a=a: step(a.layer, a.kind, qkv) for a in attends]),
        product("output, residual", attends, "output", lambda a: a.output.add_to(hidden, mixed)),
        product("norm, gate and up", mlps, "gate_up", lambda m: m.gate_up(hidden)),
        product("gate, down, residual", mlps, "down", lambda m: m.down.add_to(hidden, gates)),
        timed("norm, head", [lambda: model._head(hidden)], model._head.matrix.nbytes),
        timed("best logit", [lambda: pick(logits, 1, 0)]),
    ]
    whole = timed("step", [lambda: model.forward(batch, cache)])
    return parts, whole.us


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quant", default="int4", choices=["none", "int8", "int4"])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--position", type=int, default=64, help="of the token")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts, step_us = measure(options)
    if options.json:
        print(json.dumps({"parts": [part._asdict() for part in parts], "step_us": step_us}))
        return
    table = Table(title=f"{options.model}, {options.quant}, rank {options.rank} of {options.world_size}, one thread")
    for heading in ("part", "calls", "us each", "us a step", "MB", "GB/s"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for part in parts:
        speed = f"{part.nbytes / part.us / 1e3:.1f}" if part.nbytes else ""
        size = f"{part.calls * part.nbytes / 1e6:.1f}" if part.nbytes else ""
        table.add_row(part.name, str(part.calls), f"{part.us:.1f}", f"{part.us * part.calls:.0f}", size, speed)
    whole = sum(part.us * part.calls for part in parts)
    weights = sum(part.nbytes * part.calls for part in parts) / 1e6
    table.add_row("all parts", "", "", f"{whole:.0f}", f"{weights:.1f}", f"{weights / whole * 1e3:.1f}", style="bold")
    table.add_row("the step as a whole", "", "", f"{step_us:.0f}", "", "")
    Console().print(table)


if __name__ == "__main__":
    main()
