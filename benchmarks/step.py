"""Where a decode step's time goes: microseconds by part, of rank 0 in a ring of ranks on this machine, one thread each.

    python benchmarks/step.py [-m demo] [--quant int4] [--world-size 2] [--position 64] [--steps 64] [--json]

Parts are timed within whole steps, where each finds in the caches what the others have left there, and without those
within them, such as sums over ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import statistics
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from ringlm.cluster.agreement import BITS
from ringlm.cluster.local import local_ring
from ringlm.engine import engine as engines
from ringlm.engine import runner as runners
from ringlm.engine.engine import Engine
from ringlm.engine.follower import follow
from ringlm.engine.request import SamplingParams
from ringlm.engine.runner import Runner
from ringlm.frontend.model import resolve
from ringlm.models import causal_lm
from ringlm.models.config import read_config
from ringlm.models.loader import load_model
from ringlm.models.sizes import BLOCK
from ringlm.parallel.shard import plan_shards
from ringlm.ring import RingConfig, connect
from ringlm.weights import open_model


class Part(NamedTuple):
    """A kind of work in a step: how often it comes, microseconds and bytes of weights that it reads, all times
    together."""

    name: str
    calls: int
    us: float
    nbytes: int


class Clock:
    """Times parts of steps, each without the parts within it."""

    def __init__(self) -> None:
        self._us, self._calls, self._steps = Counter[str](), Counter[str](), list[dict[str, float]]()
        self._nbytes = Counter[str]()
        self._within_us = 0.0  # of parts within the one that runs

    def times(self, owner: Any, method: str, name: str, nbytes: int = 0) -> None:
        """Count calls of `owner.method` as part `name`, which read `nbytes` more a step."""
        work: Callable[..., object] = getattr(owner, method)
        self._nbytes[name] += nbytes

        def timed(*arguments: object, **named: object) -> object:
            outer_us, self._within_us = self._within_us, 0.0
            started = time.perf_counter()
            result = work(*arguments, **named)
            spent_us = (time.perf_counter() - started) * 1e6
            self._us[name] += spent_us - self._within_us
            self._calls[name] += 1
            self._within_us = outer_us + spent_us
            return result

        setattr(owner, method, timed)

    def step(self, step: Callable[[], object]) -> None:
        """Time one of the steps that count."""
        self._us.clear()
        self._calls.clear()
        started = time.perf_counter()
        step()
        whole_us = (time.perf_counter() - started) * 1e6
        self._steps.append({**self._us, "what is left": whole_us - sum(self._us.values()), "the step": whole_us})

    def parts(self) -> list[Part]:
        """Medians of the steps; the last part is the step as a whole."""
        medians = {name: statistics.median(step[name] for step in self._steps) for name in self._steps[0]}
        return [Part(name, self._calls[name], us, self._nbytes[name]) for name, us in medians.items()]


def watch(clock: Clock, engine: Engine, model: Any) -> None:
    """Let `clock` time the parts of a step."""
    comm: Any = engine.comm
    model._embedding.comm = SimpleNamespace(world_size=comm.world_size, all_reduce=comm.all_reduce)
    clock.times(comm, "broadcast_bytes", "sending the message")
    clock.times(model._embedding.comm, "all_reduce", "sum of embeddings")
    clock.times(comm, "all_reduce", "sums over ranks")
    clock.times(comm, "gather_bytes", "gathering the best")
    clock.times(engine.scheduler, "schedule", "scheduling")
    clock.times(engine, "_tell", "encoding it")
    clock.times(runners, "batch_of", "batch")
    clock.times(model, "_embedding", "embedding")
    clock.times(causal_lm.AttentionStep, "__call__", "rotary, cache, attention")
    clock.times(causal_lm, "AttentionStep", "attention's set-up")
    for block in model._blocks:
        attention, mlp = block.attention, block.mlp
        clock.times(attention, "qkv", "norm, qkv", attention.qkv.matrix.nbytes)
        if attention.norm is not None:
            clock.times(attention, "norm", "norms on heads")
        clock.times(attention.output, "add_to", "output, residual", attention.output.matrix.nbytes)
        if hasattr(mlp, "router"):
            chosen = mlp.router.chosen * sum(matrix.nbytes for matrix in mlp.experts.experts[0])
            clock.times(mlp.experts, "of_norm", "norm, router, experts", mlp.router.matrix.nbytes + chosen)
        else:
            clock.times(mlp, "gate_up", "norm, gate and up", mlp.gate_up.matrix.nbytes)
            clock.times(mlp.down, "add_to", "gate, down, residual", mlp.down.matrix.nbytes)
    clock.times(model, "_head", "norm, head", model._head.matrix.nbytes)
    clock.times(runners, "pick", "best logit")
    clock.times(runners, "merge", "best of all ranks")
    clock.times(engines, "sample", "sampling")
    clock.times(engine.scheduler, "commit", "committing")


def run(options: argparse.Namespace, config: RingConfig) -> list[Part]:
    """One rank's life; what rank 0 has measured."""
    torch.set_num_threads(1)
    files = open_model(resolve(options.model).path)
    plan = plan_shards(read_config(files.config), config.world_size)
    context = -(-(options.position + options.steps + 1) // BLOCK) * BLOCK
    with connect(config) as comm:
        model = load_model(
            files, plan, config.rank, comm, device=torch.device("cpu"), dtype=torch.float32, context=context,
            bits=BITS[options.quant],
        )  # fmt: skip
        runner = Runner(model, model.new_cache(context // BLOCK), comm)
        if config.rank:
            follow(runner, comm)
            return []
        engine, clock = Engine(runner, comm, max_seqs=1), Clock()
        wanted = SamplingParams(max_tokens=options.steps + 1, temperature=0, ignore_eos=True)
        engine.submit(0, [index * 7919 % model.config.vocabulary for index in range(options.position)], wanted)
        engine.step()
        watch(clock, engine, model)
        while engine.has_work:
            clock.step(engine.step)
        engine.stop()
        return clock.parts()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quant", default="int4", choices=["none", "int8", "int4"])
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--position", type=int, default=64, help="of the first token that is timed")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    configs = local_ring(options.world_size)
    with contextlib.ExitStack() as stack:
        for config in configs[1:]:
            process = multiprocessing.get_context("spawn").Process(target=run, args=(options, config), daemon=True)
            process.start()
            stack.callback(process.join, 60.0)
        parts = run(options, configs[0])
    if options.json:
        print(json.dumps([part._asdict() for part in parts]))
        return
    table = Table(title=f"{options.model}, {options.quant}, rank 0 of {options.world_size}, one thread")
    for heading in ("part", "calls", "us each", "us a step", "MB", "GB/s"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    weights = sum(part.nbytes for part in parts)
    for part in (*parts[:-1], parts[-1]._replace(nbytes=weights)):
        each = f"{part.us / part.calls:.1f}" if part.calls else ""
        speed = (f"{part.nbytes / 1e6:.1f}", f"{part.nbytes / part.us / 1e3:.1f}") if part.nbytes else ("", "")
        table.add_row(part.name, str(part.calls or ""), each, f"{part.us:.0f}", *speed)
    Console().print(table)


if __name__ == "__main__":
    main()
