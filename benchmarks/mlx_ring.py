"""ringlm's all-reduce beside that of MLX's ring: float32, two ranks of this machine.

    python -m venv mlx && mlx/bin/pip install 'mlx[cpu]'
    python benchmarks/mlx_ring.py --mlx-python mlx/bin/python [--rounds 20]

Each size has ranks of its own, and engines take turns by blocks of calls; the others sleep meanwhile. On Linux ringlm's
ranks of one machine are linked by Unix sockets; "over TCP" holds it to loopback TCP, which is what MLX uses. A rank
computes in one thread, beside which MLX has threads for its sockets. Both sum in place.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

SIZES = {"6 KB": (6 << 10, 4000), "256 KB": (256 << 10, 1000), "32 MB": (32 << 20, 8)}  # bytes, calls of a block
_ANSWER_S = 60.0


class Engine(NamedTuple):
    """`full` makes a tensor of that many equal elements; `reduce` puts the sum of both ranks' in its holder."""

    version: str
    full: Callable[[int, float], Any]
    reduce: Callable[[list[Any]], object]


def ringlm() -> Engine:
    import torch

    from ringlm.ring import RingConfig, connect

    torch.set_num_threads(1)
    ring = connect(RingConfig.from_env())
    return Engine(
        version=f"torch {torch.__version__}",
        full=lambda length, value: torch.full((length,), value),
        reduce=lambda held: ring.all_reduce(held[0]),
    )


def ringlm_over_tcp() -> Engine:
    from ringlm.ring import sockets

    sockets.listen_beside = lambda sock: None
    return ringlm()


def mlx() -> Engine:
    import mlx.core as mx

    mx.distributed.init(strict=True, backend="ring")

    def reduce(held: list[Any]) -> None:
        held[0] = mx.distributed.all_sum(held[0])  # which nobody else holds, so that the sum takes its memory
        mx.eval(held[0])

    return Engine(f"mlx {mx.__version__}", mx.full, reduce)


ENGINES = {"ringlm": ringlm, "ringlm over TCP": ringlm_over_tcp, "MLX": mlx}


def serve(name: str, rank: int) -> None:
    """A rank, in a process of its own: says its version, then for each "BYTES CALLS" the seconds of every call."""
    engine = ENGINES[name]()
    print(json.dumps(engine.version), flush=True)
    for line in sys.stdin:
        nbytes, count = map(int, line.split())
        held = [engine.full(nbytes // 4, rank + 1.0)]
        engine.reduce(held)
        if {held[0][place].item() for place in (0, -1)} != {3.0}:
            raise RuntimeError(f"{name}'s sum is wrong")
        held = [engine.full(nbytes // 4, 0.0)]
        times = []
        for _ in range(1 + count):  # the first is left out
            started = time.perf_counter()
            engine.reduce(held)
            times.append(time.perf_counter() - started)
        print(json.dumps(times[1:]), flush=True)


class Ranks:
    """The two processes of an engine, which end with `stack`. Rank 0's word counts."""

    def __init__(self, name: str, python: str, stack: contextlib.ExitStack) -> None:
        from ringlm.cluster.local import free_ports

        ports = free_ports(2)
        hosts = Path(stack.enter_context(tempfile.TemporaryDirectory()), "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        self._name, self._processes = name, []
        for rank in range(2):
            ring = {"RANK": rank, "WORLD_SIZE": 2, "PORT": ports[rank], "RIGHT": ports[1 - rank]}
            environment = {f"RING_{key}": str(value) for key, value in ring.items()}
            environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts), "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                [python, __file__, "--serve", name, str(rank)],
                env=os.environ | environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            self._processes.append(stack.enter_context(process))
            stack.callback(process.kill)
        self.version = self._answer()

    def block(self, nbytes: int, count: int) -> list[float]:
        """Seconds of each of `count` calls, after two that do not count."""
        for process in self._processes:
            print(nbytes, count, file=process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        answers = []
        for rank, process in enumerate(self._processes):
            ready, _, _ = select.select([process.stdout], [], [], _ANSWER_S)
            line = process.stdout.readline() if ready else ""
            if not line:
                what = "ended" if ready else f"said nothing in {_ANSWER_S:.0f} s"
                sys.exit(f"rank {rank} of {self._name} {what}.")
            answers.append(json.loads(line))
        return answers[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mlx-python", required=True, metavar="PATH", help="of an environment that has MLX")
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(f"{'bytes':>7}  {'engine':15}  {'us p50':>9}  {'us p90':>9}  {'/ ringlm':>8}  lowest and highest round")
    for size in SIZES:
        versions = measure(size, options.mlx_python, options.rounds)
    print(f"all-reduce, float32, two ranks; {', '.join(versions)}")


def measure(size: str, mlx_python: str, rounds: int) -> list[str]:
    """Prints an engine's line, its median over ringlm's in it, of all calls and by rounds; the engines' versions."""
    blocks: dict[str, list[list[float]]] = {name: [] for name in ENGINES}
    with contextlib.ExitStack() as stack:
        engines = {name: Ranks(name, mlx_python if name == "MLX" else sys.executable, stack) for name in ENGINES}
        for _, (name, ranks) in itertools.product(range(rounds), engines.items()):
            blocks[name].append(ranks.block(*SIZES[size]))
    ours, _ = quantiles_us(blocks["ringlm"])
    for name, found in blocks.items():
        p50, p90 = quantiles_us(found)
        pairs = zip(map(statistics.median, found), map(statistics.median, blocks["ringlm"]), strict=True)
        ratios = sorted(theirs / our for theirs, our in pairs)
        line = f"{size:>7}  {name:15}  {p50:>9,.1f}  {p90:>9,.1f}  {p50 / ours:>7.2f}x"
        print(f"{line}  {ratios[0]:.2f} and {ratios[-1]:.2f}", flush=True)
    return sorted({ranks.version for ranks in engines.values()})


def quantiles_us(blocks: list[list[float]]) -> tuple[float, float]:
    """The median of all calls and their ninth decile, in microseconds."""
    calls = sorted(itertools.chain.from_iterable(blocks))
    return calls[len(calls) // 2] * 1e6, calls[len(calls) * 9 // 10] * 1e6


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], int(sys.argv[3]))
    else:
        main()
