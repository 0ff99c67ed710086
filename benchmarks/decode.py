"""Tokens per second at several world sizes, of one model or several, in one interleaved run.

    python benchmarks/decode.py [-m demo[,MODEL…]] [--world-size 1,2] [--prompt 128] [-n 32] [--rounds 7] [--json]

All rings are loaded at once, a thread a rank, and take turns: one answers while the others sleep, so that
all see the same weather. Reported are medians of the rounds, their ratio to the model's first world size, and what
share its weights are of what as many processes read in that time, which takes a turn as well; of a mixture of experts,
of which a token reads a part, that means nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from ringlm.cluster.client import EngineClient
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams
from ringlm.frontend.model import resolve

READ_BYTES = 200_000_000  # more than caches hold
READ_S = 0.5


class Turn(NamedTuple):
    """One answer: tokens per second of the prompt and of the answer, the share of time in the ring, and the bytes per
    second that as many processes read together right after it."""

    prompt: float
    decode: float
    ring_share: float
    read: float


class Readers:
    """Processes of one thread that read memory when told, all at once."""

    def __init__(self, stack: contextlib.ExitStack, count: int) -> None:
        self._pipes = []
        spawn = multiprocessing.get_context("spawn")
        for _ in range(count):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_read, args=(theirs,), daemon=True)
            process.start()
            stack.callback(process.terminate)
            self._pipes.append(ours)
        for pipe in self._pipes:
            _answer(pipe)

    def bytes_per_s(self) -> float:
        """Of all of them together."""
        for pipe in self._pipes:
            pipe.send(True)
        return sum(map(_answer, self._pipes))


def _answer(pipe: Connection) -> float:
    assert pipe.poll(60.0), "a process that reads memory is silent"
    return float(pipe.recv())


def _read(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    memory = torch.ones(READ_BYTES // 4)
    pipe.send(0.0)
    while pipe.recv():
        turns, started = 0, time.perf_counter()
        while time.perf_counter() - started < READ_S:
            memory.sum()
            turns += 1
        pipe.send(turns * memory.nbytes / (time.perf_counter() - started))


def turn(client: EngineClient, prompt: list[int], tokens: int, readers: Readers) -> Turn:
    """Have `client` answer `prompt` with `tokens` tokens, then the readers read."""
    client.submit(prompt, SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True))
    while True:
        event = client.next_event(300.0)
        assert event is not None, "no token in five minutes"
        if event.finish_reason is not None:
            busy_s = event.prefill_s + event.decode_s
            prompt_s, decode_s = len(prompt) / event.prefill_s, (tokens - 1) / event.decode_s
            return Turn(prompt_s, decode_s, event.ring_s / busy_s, readers.bytes_per_s())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--world-size", default="1,2", help="one or more, such as 1,2,3")
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("-n", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quant", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    models = [resolve(model) for model in options.model.split(",")]
    sizes = [int(size) for size in options.world_size.split(",")]
    keys = [(model.name, size) for model in models for size in sizes]
    with contextlib.ExitStack() as stack:
        clients, readers = {}, {size: Readers(stack, size) for size in sizes}
        for model in models:
            for size in sizes:
                settings = Settings(dtype=options.dtype, quant=options.quant, context=2048)
                spec = EngineSpec(model=str(model.path), settings=settings, local_ranks=size, threads=1)
                clients[model.name, size] = stack.enter_context(EngineClient.start(spec))
        draw, vocabulary = random.Random(0), min(client.ready.vocabulary for client in clients.values())
        turns: dict[tuple[str, int], list[Turn]] = {key: [] for key in keys}
        for round_ in range(options.rounds + 1):
            prompt = [draw.randrange(vocabulary) for _ in range(options.prompt)]
            for key in keys:
                result = turn(clients[key], prompt, options.n, readers[key[1]])
                if round_ > 0:  # the first warms up
                    turns[key].append(result)
        dtype = clients[keys[0]].ready.dtype
        weights = {key: sum(rank.weights_bytes for rank in client.ready.ranks) for key, client in clients.items()}
    medians = {key: Turn(*(statistics.median(column) for column in zip(*turns[key], strict=True))) for key in keys}
    if options.json:
        rows = [
            {"model": key[0], "world_size": key[1], "weights_bytes": weights[key], **medians[key]._asdict()}
            for key in keys
        ]
        print(json.dumps({"dtype": dtype, "rows": rows}))
        return
    table = Table(title=f"{dtype}, a thread a rank")
    for heading in (
        "model",
        "ranks",
        f"pp{options.prompt} tok/s",
        "",
        f"tg{options.n} tok/s",
        "",
        "in the ring",
        "read GB/s",
        "of memory's",
    ):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for (name, size), row in medians.items():
        first, nbytes = medians[name, sizes[0]], weights[name, size]
        table.add_row(
            name, str(size), f"{row.prompt:.1f}", f"{row.prompt / first.prompt:.2f}x",
            f"{row.decode:.1f}", f"{row.decode / first.decode:.2f}x", f"{row.ring_share:.0%}",
            f"{row.decode * nbytes / 1e9:.1f}", f"{row.decode * nbytes / row.read:.0%}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
