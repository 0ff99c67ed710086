"""What headers, checksums and seals cost: all-reduces of two ranks beside the bare exchange of the same bytes.

    python benchmarks/seal.py [--sizes 6144,33554432] [--rounds 20] [--unix] [--json]

Bare is a loop of send and recv over a socket with the options of a link, and the addition: nothing tells whose those
bytes are, or whether they are right. The same two processes make all calls, by turns, over TCP unless `--unix`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import secrets
import socket
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from ringlm.cluster.local import local_ring
from ringlm.ring import RingConfig, connect, sockets
from ringlm.ring.seal import MODES
from ringlm.ring.wire import view

SEGMENT_BYTES = 1 << 19
_NOW = socket.MSG_DONTWAIT


def bare(sock: socket.socket, tensor: torch.Tensor, scratch: torch.Tensor) -> None:
    """Adds a segment once it is both sent and received."""
    out, room, item, nbytes = view(tensor), view(scratch), tensor.element_size(), tensor.nbytes
    sent = got = done = 0
    while done < nbytes:
        if sent < nbytes:
            with contextlib.suppress(BlockingIOError):
                sent += sock.send(out[sent : sent + (1 << 20)], _NOW)
        end = min(done + SEGMENT_BYTES, nbytes)
        if got < end:
            try:
                got += sock.recv_into(room[got - done : end - done], 0, _NOW)
            except BlockingIOError:
                os.sched_yield()
        if got >= end and sent >= end:
            tensor[done // item : end // item].add_(scratch[: (end - done) // item])
            done = end


def calls(configs: dict[str, RingConfig], sock: socket.socket) -> dict[str, Callable[[torch.Tensor], object]]:
    """The all-reduces to compare, by name."""
    scratch = torch.empty(SEGMENT_BYTES // 4)
    rings = {name: connect(config) for name, config in configs.items()}
    return {"bare": lambda tensor: bare(sock, tensor, scratch)} | {n: ring.all_reduce for n, ring in rings.items()}


def rank(
    configs: dict[str, RingConfig], sock: socket.socket, sizes: list[int], rounds: int, unix: bool
) -> dict[str, dict[int, list[float]]]:
    """Make all calls; the medians of this rank's blocks, in us."""
    torch.set_num_threads(1)
    if not unix:
        sockets.connect_beside = lambda *_: None  # type: ignore[assignment]
    sockets.tune(sock)
    found: dict[str, dict[int, list[float]]] = {}
    everything = calls(configs, sock)
    for turn in range(rounds + 1):
        for nbytes in sizes:
            for name in sorted(everything, reverse=turn % 2 == 1):
                tensor, times = torch.zeros(nbytes // 4), []
                for _ in range(max(6, min(400, (1 << 25) // nbytes))):
                    started = time.perf_counter()
                    everything[name](tensor)
                    times.append(time.perf_counter() - started)
                if turn:  # the first warms up
                    found.setdefault(name, {}).setdefault(nbytes, []).append(statistics.median(times[1:]) * 1e6)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="6144,262144,4194304,33554432")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--unix", action="store_true", help="over Unix sockets, as between ranks of one machine")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    sizes, secret = [int(size) for size in options.sizes.split(",")], secrets.token_bytes(16)
    rings = {mode: [ring.replace(secret=secret, seal=mode) for ring in local_ring(2)] for mode in MODES[::-1]}
    if options.unix:
        ends = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            one = socket.create_connection(server.getsockname())
            ends = one, server.accept()[0]
    shared = (sizes, options.rounds, options.unix)
    process = multiprocessing.get_context("fork").Process(
        target=rank, args=({name: ring[1] for name, ring in rings.items()}, ends[1], *shared), daemon=True
    )
    process.start()
    found = rank({name: ring[0] for name, ring in rings.items()}, ends[0], *shared)
    rows = []
    for nbytes in sizes:
        for name, times in found.items():
            us, base = times[nbytes], found["bare"][nbytes]
            more = statistics.median(one - other for one, other in zip(us, base, strict=True))
            rows.append(
                {
                    "bytes": nbytes,
                    "what": "bare" if name == "bare" else f"--seal {name}",
                    "us_p50": round(statistics.median(us), 1),
                    "more_us": round(more, 1),
                    "more": round(more / statistics.median(base), 3),
                }
            )
    if options.json:
        print(json.dumps({"rows": rows}))
    else:
        table = Table("bytes", "", "us", "more than bare, us", "share")
        for row in rows:
            figures = (str(row[key]) for key in ("what", "us_p50", "more_us"))
            table.add_row(f"{row['bytes']:,}", *figures, f"{row['more']:.0%}")
        Console().print(table)
    process.join(5.0)
    process.kill()


if __name__ == "__main__":
    main()
