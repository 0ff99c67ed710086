"""torch.distributed over the ring and over gloo, in turns, one thread a rank: all-reduces, a training step, generation.

    python benchmarks/torch_backend.py [--only all_reduce,train,generate] [--rounds 15] [--json]

All-reduces at 2 and at 4 ranks, DistributedDataParallel of a small net and transformers' tensor-parallel generation of
a random Llama at 2. In each process both backends have a group of the same ranks, and take turns of some calls each;
for generation each has processes of its own, by turns. Figures are rank 0's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

SIZES = {6 << 10: 200, 256 << 10: 60, 32 << 20: 3}  # bytes, and calls a turn
BACKENDS = ("ring", "gloo")
WANTED = {("all_reduce", 2, 6 << 10): 12, ("all_reduce", 2, 256 << 10): 4, ("all_reduce", 2, 32 << 20): 1.3}


def in_turns(calls: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, list[float]]:
    """Microseconds of each of `count` calls a turn, by backend, after a turn that does not count."""
    times: dict[str, list[float]] = {backend: [] for backend in calls}
    for turn in range(rounds + 1):
        for backend, call in calls.items():
            dist.barrier()
            for _ in range(count):
                started = time.perf_counter()
                call()
                if turn:
                    times[backend].append(1e6 * (time.perf_counter() - started))
    return times


def all_reduces(groups: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    rows = []
    for nbytes, count in SIZES.items():
        tensor = torch.zeros(nbytes // 4)
        calls = {name: partial(dist.all_reduce, tensor, group=group) for name, group in groups.items()}
        rows += [row("all_reduce", name, times, nbytes) for name, times in in_turns(calls, count, rounds).items()]
    return rows


def training(groups: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Steps of a perceptron of 0.8 million parameters (3.2 MB of gradients), 64 rows a rank."""

    def step(group: Any) -> Callable[[], object]:
        torch.manual_seed(0)
        layers = [torch.nn.Linear(256, 512), torch.nn.ReLU(), torch.nn.Linear(512, 1024), torch.nn.ReLU()]
        net = torch.nn.parallel.DistributedDataParallel(
            torch.nn.Sequential(*layers, torch.nn.Linear(1024, 128)), process_group=group
        )
        optimizer, inputs = torch.optim.SGD(net.parameters(), lr=0.01), torch.randn(64, 256)

        def once() -> None:
            optimizer.zero_grad()
            net(inputs).square().mean().backward()
            optimizer.step()

        return once

    times = in_turns({name: step(group) for name, group in groups.items()}, 10, rounds)
    return [row("train", name, found, 0) for name, found in times.items()]


def row(what: str, backend: str, times: list[float], nbytes: int) -> dict[str, Any]:
    return {
        "what": what,
        "backend": backend,
        "world_size": dist.get_world_size(),
        "bytes": nbytes,
        "us_p50": round(statistics.median(times), 1),
        "us_p90": round(statistics.quantiles(times, n=10)[8], 1),
    }


def generation(backend: str, rounds: int, folder: str) -> list[dict[str, Any]]:
    """Microseconds a token, of 16 greedy ones after 8. The group is that of all ranks: whatever mesh transformers is
    given, it sums over that one."""
    from transformers import AutoModelForCausalLM

    if dist.get_rank() == 0:
        save_model(folder)
    dist.barrier()
    prompt, tokens = torch.arange(8)[None], 16
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    call = partial(
        model.generate, prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    times = in_turns({backend: call}, 1, rounds)[backend]
    return [row("generate", backend, [one / tokens for one in times], 0)]


def save_model(folder: str) -> None:
    """A random Llama: 8 layers of 512, with two sums in each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def rank(what: str, rounds: int, folder: str, backend: str) -> None:
    """A rank's process: what it is to measure, and its rows as JSON on rank 0's stdout."""
    torch.set_num_threads(1)
    dist.init_process_group(backend)
    if what == "generate":
        rows = generation(backend, rounds, folder)
    else:
        groups = {backend: dist.group.WORLD, "gloo": dist.new_group(backend="gloo")}
        rows = (training if what == "train" else all_reduces)(groups, rounds)
    if dist.get_rank() == 0:
        print(json.dumps(rows), flush=True)
    dist.destroy_process_group()


def launch(what: str, world_size: int, rounds: int, backend: str = "ring") -> list[dict[str, Any]]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    environ = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "TQDM_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [*launcher, __file__, "--rank", what, str(rounds), folder, backend]
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, timeout=900, check=True)
    return list(json.loads(done.stdout.strip().splitlines()[-1]))


def measure(only: list[str], rounds: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for what in only:
        if what == "generate":  # each backend in processes of its own, by turns
            turns = [launch(what, 2, rounds, backend)[0] for _ in range(3) for backend in BACKENDS]
            found = [middle([turn for turn in turns if turn["backend"] == backend]) for backend in BACKENDS]
        else:
            sizes = ((2, rounds), (4, max(2, rounds // 3))) if what == "all_reduce" else ((2, rounds),)
            found = [one for world_size, turns in sizes for one in launch(what, world_size, turns)]
        Console(stderr=True).print(report(found))
        rows += found
    return rows


def middle(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row whose median is the median of all."""
    return sorted(rows, key=lambda one: float(one["us_p50"]))[len(rows) // 2]


def report(rows: list[dict[str, Any]]) -> Table:
    table = Table("what", "ranks", "bytes", "ring, us", "gloo, us", "gloo / ring", "wanted")
    cells = {(one["what"], one["world_size"], one["bytes"], one["backend"]): one["us_p50"] for one in rows}
    for what, world_size, nbytes in dict.fromkeys(key[:3] for key in cells):
        ours, theirs = (cells[what, world_size, nbytes, backend] for backend in BACKENDS)
        wanted = WANTED.get((what, world_size, nbytes), 1.3 if what == "generate" else 1)
        table.add_row(
            what, str(world_size), f"{nbytes:,}", f"{ours:,.0f}", f"{theirs:,.0f}", f"{theirs / ours:.2f}", f"{wanted}"
        )
    return table


def main() -> None:
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2], int(sys.argv[3]), *sys.argv[4:6])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="all_reduce,train,generate")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = measure(options.only.split(","), options.rounds)
    if options.json:
        print(json.dumps({"torch": torch.__version__, "rows": rows}))
    else:
        Console().print(report(rows))


if __name__ == "__main__":
    main()
