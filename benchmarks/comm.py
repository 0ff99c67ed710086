"""All-reduce latency and bandwidth: this ring against gloo, in one interleaved run.

    python benchmarks/comm.py [--sizes 1K,6K,256K,4M,32M] [--world-size 2,3,4] [--dtype float32] [--device cpu] [--json]
    python benchmarks/comm.py --algorithms [--world-size 2,3,4]      # the table of algorithms, without a run

Each rank is one process of one thread that holds both, a ring and a gloo group over loopback. Blocks of
calls alternate between the two, so that both see the same weather. Times are rank 0's, a call each, until the sum is
there on the device; with `--device cuda` all ranks share the GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TypedDict

import torch
import torch.distributed as dist

from ringlm.ring import RingConfig, connect
from ringlm.ring.address import Address
from ringlm.ring.algorithms import table

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_ROUNDS = 10  # blocks of each backend, alternating
_LIMIT_S = 600.0


class Row(TypedDict):
    backend: str
    world_size: int
    dtype: str
    bytes: int
    us_p50: float
    us_p90: float
    us_p99: float
    gb_per_s: float
    algorithm: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="1K,6K,256K,4M,32M", help="bytes, with K, M or G")
    parser.add_argument("--world-size", default="2", help="one or more, such as 2,3,4")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, default=1.0, help="roughly, for each size and backend")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--algorithms", action="store_true", help="print which algorithm carries what, and end")
    options = parser.parse_args()
    if options.algorithms:
        show_algorithms(list(map(int, options.world_size.split(","))))
        return
    sizes = [_parse_size(text) for text in options.sizes.split(",")]
    rows: list[Row] = []
    for world_size in map(int, options.world_size.split(",")):
        rows += measure(world_size, sizes, options.dtype, options.seconds, options.device)
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        show(rows)


def measure(world_size: int, sizes: list[int], dtype: str, seconds: float, device: str = "cpu") -> list[Row]:
    """The rows of one world size, from processes started and ended here."""
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    ports = _free_ports(world_size)
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            spawn.Process(target=_rank, args=(rank, ports, f"{folder}/store", sizes, dtype, seconds, device, theirs))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        theirs.close()
        try:
            if not ours.poll(_LIMIT_S):
                raise SystemExit(f"no result within {_LIMIT_S:.0f} s")
            rows: list[Row] = ours.recv()
        except EOFError:
            raise SystemExit("a rank failed; its message is above") from None
        finally:
            for process in ranks:
                process.join(10.0)
                process.kill()
    return rows


def _rank(
    rank: int,
    ports: list[int],
    store: str,
    sizes: list[int],
    dtype: str,
    seconds: float,
    device: str,
    result: Connection,
) -> None:
    torch.set_num_threads(1)
    world_size = len(ports)
    right = Address("127.0.0.1", ports[(rank + 1) % world_size])
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    config = RingConfig(rank=rank, world_size=world_size, port=ports[rank], right=right)
    rows: list[Row] = []
    with connect(config) as ring:

        def gloo(tensor: torch.Tensor) -> None:
            dist.all_reduce(tensor)

        for nbytes in sizes:
            kind = getattr(torch, dtype)
            tensor = torch.full((nbytes // kind.itemsize,), 1e-20, dtype=kind, device=device)
            times: dict[str, list[float]] = {"ring": [], "gloo": []}
            calls = {name: _calls(call, tensor, seconds) for name, call in (("ring", ring.all_reduce), ("gloo", gloo))}
            counts = torch.tensor([calls["ring"], calls["gloo"]])
            ring.broadcast(counts)  # every rank makes as many calls as rank 0
            for _, (name, call, count) in itertools.product(
                range(_ROUNDS), (("ring", ring.all_reduce, int(counts[0])), ("gloo", gloo, int(counts[1])))
            ):
                call(tensor)  # the first after the other backend's is not counted
                times[name] += _block(call, tensor, count)
            algorithms = {"ring": ring.algorithm("all_reduce", tensor.nbytes, tensor.dtype), "gloo": "gloo's"}
            rows += [_row(name, world_size, tensor, found, algorithms[name]) for name, found in times.items()]
    if rank == 0:
        result.send(rows)
    dist.destroy_process_group()


def _calls(call: Callable[[torch.Tensor], object], tensor: torch.Tensor, seconds: float) -> int:
    """How many calls a block should have, from a few of them."""
    _block(call, tensor, 3)
    return min(2000, max(3, int(seconds / _ROUNDS / statistics.median(_block(call, tensor, 5)))))


def _block(call: Callable[[torch.Tensor], object], tensor: torch.Tensor, count: int) -> list[float]:
    times = []
    for _ in range(count):
        started = time.perf_counter()
        call(tensor)
        if tensor.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def _row(backend: str, world_size: int, tensor: torch.Tensor, times: list[float], algorithm: str) -> Row:
    times.sort()
    nbytes = tensor.nbytes
    p50, p90, p99 = (times[int(len(times) * share)] for share in (0.5, 0.9, 0.99))
    return Row(
        backend=backend,
        world_size=world_size,
        dtype=str(tensor.dtype).removeprefix("torch."),
        bytes=nbytes,
        us_p50=round(p50 * 1e6, 2),
        us_p90=round(p90 * 1e6, 2),
        us_p99=round(p99 * 1e6, 2),
        gb_per_s=round(nbytes / p50 / 1e9, 3),
        algorithm=algorithm,
    )


def show(rows: list[Row]) -> None:
    """A table: rich on a terminal, plain columns in a pipe."""
    head = ("ranks", "bytes", "ring us p50", "p99", "gloo us p50", "p99", "ring GB/s", "gloo/ring", "algorithm")
    lines = []
    for ours, theirs in itertools.pairwise(rows):
        if (ours["backend"], theirs["backend"]) != ("ring", "gloo"):
            continue
        figures = (ours["us_p50"], ours["us_p99"], theirs["us_p50"], theirs["us_p99"])
        ratio = theirs["us_p50"] / ours["us_p50"]
        cells = (str(ours["world_size"]), f"{ours['bytes']:,}", *(f"{figure:,.1f}" for figure in figures))
        lines.append((*cells, f"{ours['gb_per_s']:.2f}", f"{ratio:.2f}x", ours["algorithm"]))
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head, title=f"all-reduce, {rows[0]['dtype']}, one thread a rank")
        for column in table.columns:
            column.justify = "right"
        for line in lines:
            table.add_row(*line)
        Console().print(table)
        return
    for line in (head, *lines):
        print("  ".join(cell.rjust(12) for cell in line))


def show_algorithms(world_sizes: list[int]) -> None:
    """`ringlm.ring.algorithms`, as rows."""
    kinds = list(itertools.product(("mesh", "chain"), (False, True), (False, True)))
    for world_size, (topology, crowded, half) in itertools.product(world_sizes, kinds):
        if world_size > 2 or topology == "mesh":
            more = (", more ranks than cores" if crowded else "") + (", half types" if half else "")
            print(f"{world_size} ranks, {topology}{more}")
            for operation, nbytes, algorithm in table(world_size, topology, crowded, half):
                size = "any size" if nbytes is None else f"to {nbytes:,} bytes"
                print(f"    {operation:15} {size:18} {algorithm}")


def _parse_size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    try:
        return int(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        raise SystemExit(f"--sizes holds {text!r}; write numbers of bytes, such as 6K or 32M") from None


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, outside the range from which the kernel picks."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as probe:
            if port not in ports and probe.connect_ex(("127.0.0.1", port)):
                ports.append(port)
    return ports


if __name__ == "__main__":
    main()
