"""What strangers at its ports cost a ring: tokens per second without, under an attack, and with it aimed elsewhere.

    python benchmarks/hostile.py [-m demo] [--rate 150] [--seconds 60] [--block 5] [--json]

Two local ranks decode one request after the other. A process of its own opens connections at `--rate` a second, in
equal parts such as close at once, keep silent for five seconds, send random bytes, send the right preamble with a wrong
hello, and begin a handshake with a wrong secret; in blocks by turns to both ranks, and to a listener that has nothing
to do with them. Three answers from before the attack and from after it must be equal.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import secrets
import selectors
import socket
import statistics
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from typing import Any

from ringlm import LLM, SamplingParams
from ringlm.cluster.local import free_ports
from ringlm.ring.handshake import MAGIC, PROTOCOL, Hello, initiate

SILENT_S = 5.0
TOKENS = 64
PREAMBLE = MAGIC + bytes((PROTOCOL, 1))


def attack(orders: Connection, rate: float) -> None:
    """Connections to the ports that were ordered last, for ever."""
    dice, ports, silent = random.Random(1), [], []
    kinds = itertools.cycle(range(5))
    while True:
        if orders.poll():
            ports = orders.recv()
        started = time.monotonic()
        while silent and silent[0][0] < started - SILENT_S:
            silent.pop(0)[1].close()
        for port in ports:
            try:
                sock = socket.create_connection(("127.0.0.1", port), timeout=1.0)
            except OSError:
                continue
            silent.append((started, sock))
            with contextlib.suppress(OSError):  # it has hung up, as it should
                visit(sock, next(kinds), dice)
        time.sleep(max(0.0, len(ports or [0]) / rate - (time.monotonic() - started)))


def visit(sock: socket.socket, kind: int, dice: random.Random) -> None:
    """One of the five. None waits for an answer."""
    if kind == 0:
        sock.close()
    elif kind == 2:
        sock.sendall(dice.randbytes(200))
    elif kind == 3:
        sock.sendall(PREAMBLE + (64).to_bytes(2, "little") + dice.randbytes(64))
    elif kind == 4:
        handshake = initiate(Hello("ring", 1, 0, 2, 0, ""), b"wrong", "it")
        next(handshake), handshake.send(b"")
        sock.sendall(PREAMBLE + handshake.send(PREAMBLE))


def bystander(listening: socket.socket) -> None:
    """A listener that reads what comes, answers 8 bytes to it and hangs up."""
    selector = selectors.DefaultSelector()
    selector.register(listening, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            sock = key.fileobj
            assert isinstance(sock, socket.socket)
            if sock is listening:
                selector.register(listening.accept()[0], selectors.EVENT_READ)
                continue
            selector.unregister(sock)
            try:
                if sock.recv(2048):
                    sock.sendall(PREAMBLE)
            except OSError:
                pass  # it left before
            sock.close()


def measure(llm: LLM, seconds: float) -> float:
    """Tokens per second."""
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    started, tokens = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        tokens += len(llm.generate(["Once upon a time"], params)[0].token_ids)
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--rate", type=float, default=150.0, help="connections a second")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the attack on the ring")
    parser.add_argument("--block", type=float, default=5.0, help="seconds before the attack turns elsewhere")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    first, second = free_ports(2)
    ring = {"RING_WORLD_SIZE": "2", "RING_SECRET": secrets.token_hex(16), "OMP_NUM_THREADS": "1"}
    daemon_environment = os.environ | ring | {"RING_RANK": "1", "RING_PORT": str(second), "RING_RIGHT": str(first)}
    daemon = subprocess.Popen(
        [sys.executable, "-m", "ringlm", "run", "-m", options.model, "--threads", "1"], env=daemon_environment
    )
    os.environ |= ring | {"RING_RANK": "0", "RING_PORT": str(first), "RING_RIGHT": str(second)}
    context = multiprocessing.get_context("spawn")
    orders, theirs = context.Pipe()
    listening = socket.create_server(("127.0.0.1", 0), backlog=128)
    processes: list[Any] = [
        context.Process(target=attack, args=(theirs, options.rate), daemon=True),
        context.Process(target=bystander, args=(listening,), daemon=True),
    ]
    found: dict[str, list[float]] = {"nobody": [], "elsewhere": [], "at the ring": []}
    try:
        with LLM(options.model) as llm:
            before = answers(llm)
            for process in processes:
                process.start()
            other = listening.getsockname()[1]
            targets = {"nobody": [], "elsewhere": [other, other], "at the ring": [first, second]}
            for _ in range(max(1, round(options.seconds / options.block))):
                for name, ports in targets.items():
                    orders.send(ports)
                    time.sleep(1.0)  # the last block's silent ones are still there
                    found[name].append(measure(llm, options.block))
            same = answers(llm) == before
    finally:
        for process in processes:
            process.kill()
        daemon.wait(30.0)
    ratios = [ours / theirs for ours, theirs in zip(found["at the ring"], found["elsewhere"], strict=True)]
    result = {
        "rate": options.rate,
        "tokens_per_s": {name: round(statistics.median(rates), 1) for name, rates in found.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "same_answers": same,
    }
    print(json.dumps(result) if options.json else "\n".join(f"{name:14} {value}" for name, value in result.items()))


def answers(llm: LLM) -> list[str]:
    """What the model says to three prompts."""
    prompts = ["Once upon a time", "The capital of France is", "def fib(n):"]
    return [out.text for out in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=16))]


if __name__ == "__main__":
    main()
