"""How long a stream pauses when a daemon is killed and its supervisor starts it again, part by part.

    python benchmarks/recovery.py [-m demo] [--quant none] [--rounds 5] [--json]

Rank 0 and one that has joined, on this machine with one thread each, answer; after 50 tokens the latter gets SIGKILL,
and is started again once it has ended. Times are medians: until rank 0 knows, until the process is started, its
imports, joining (its model's headers and the way to rank 0), forming the ring and loading, and from there to the next
token of the stream, which is then compared with one that nothing has disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import statistics
import subprocess
import threading
import time
from collections.abc import Callable

from ringlm.cluster import spec
from ringlm.cluster.client import EngineClient
from ringlm.cluster.local import LOOPBACK, free_ports
from ringlm.cluster.messages import Output
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams
from ringlm.frontend.model import resolve
from ringlm.ring import RingConfig
from ringlm.ring.address import Address

PROMPT = list(range(100, 164))
PARAMS = SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
KILLED_AT = 50
WITHIN_S = 120.0
MARKS = {"started": "started", "is rank 1": "seated", "ready:": "loaded"}  # words of its log, and what they mean


class Supervisor:
    """One daemon, started again whenever it ends; `at` is when what has happened last to it."""

    def __init__(self, engine: EngineSpec) -> None:
        self.at: dict[str, float] = {}
        self._engine = engine
        self._over = False
        self._start()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def kill(self) -> None:
        self.at = {"killed": time.monotonic()}
        self._process.kill()

    def close(self) -> None:
        self._over = True
        self._process.kill()
        self._thread.join()

    def _start(self) -> None:
        arguments, fd = spec.command(self._engine)
        self.at["spawned"] = time.monotonic()
        environment = os.environ | {"RINGLM_LOG": "debug"}
        self._process = subprocess.Popen(
            arguments, pass_fds=(fd,), stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
        )
        os.close(fd)

    def _watch(self) -> None:
        while True:
            assert self._process.stderr is not None
            for line in self._process.stderr:
                for words, mark in MARKS.items():
                    if words in line:
                        self.at[mark] = time.monotonic()
            self._process.wait()
            if self._over:
                return
            self._start()


def stream(client: EngineClient, then: Callable[[], None] | None = None) -> tuple[list[int], dict[str, float]]:
    """An answer; `then` is called in its middle. And when rank 0 knew what that did, and the next token came."""
    client.submit(PROMPT, PARAMS)
    tokens: list[int] = []
    at: dict[str, float] = {}
    deadline = time.monotonic() + WITHIN_S
    while time.monotonic() < deadline:
        event = client.next_event(0.01)
        if client.recovering is not None:
            at.setdefault("noticed", time.monotonic())
        if not isinstance(event, Output):
            continue
        if "noticed" in at and client.recovering is None and event.tokens:
            at.setdefault("token", time.monotonic())
        tokens += event.tokens
        if event.finish_reason is not None:
            return tokens, at
        if then is not None and len(tokens) >= KILLED_AT:
            then()
            then = None
    raise SystemExit("the answer has not come to its end")


def measure(model: str, quant: str, rounds: int) -> dict[str, float]:
    """Seconds of each part."""
    own = RingConfig(port=free_ports(1)[0], secret=secrets.token_bytes(16), interface=LOOPBACK)
    first = EngineSpec(
        model=model, settings=Settings(quant=quant), ring=own, awaits=2, threads=1, rejoin_timeout_s=WITHIN_S
    )
    joins = EngineSpec(model=model, ring=own.replace(port=0), join=Address(LOOPBACK, own.port), threads=1)
    supervisor = Supervisor(joins)
    found: list[dict[str, float]] = []
    try:
        with EngineClient.start(first) as client:
            undisturbed, _ = stream(client)
            for _ in range(rounds):
                tokens, at = stream(client, supervisor.kill)
                assert tokens == undisturbed, "another text"
                at |= supervisor.at
                found.append(
                    {
                        "noticing": at["noticed"] - at["killed"],
                        "starting the process": at["spawned"] - at["killed"],
                        "imports": at["started"] - at["spawned"],
                        "joining": at["seated"] - at["started"],
                        "forming and loading": at["loaded"] - at["seated"],
                        "first token": at["token"] - at["loaded"],
                        "pause of the stream": at["token"] - at["killed"],
                    }
                )
    finally:
        supervisor.close()
    return {part: statistics.median(row[part] for row in found) for part in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quant", default="none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    parts = measure(str(resolve(options.model).path), options.quant, options.rounds)
    if options.json:
        print(json.dumps(parts))
    else:
        print("\n".join(f"{part:22} {seconds:7.2f} s" for part, seconds in parts.items()))


if __name__ == "__main__":
    main()
