"""Seeded faults of any rank in any phase, one after the other in rings that stay: every answer is the undisturbed one.

RINGLM_FAULT_RUNS says how many; a few are enough to see that the mechanism holds.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.rings import ProcessRing, process_ring
from tests.cluster.test_recovery import SETTINGS, answers

RUNS = int(os.environ.get("RINGLM_FAULT_RUNS", "2"))


class Faults:
    """What befalls one ring; drawn from a seed, and told when it happens."""

    def __init__(self, ring: ProcessRing, seed: int) -> None:
        self._ring = ring
        self._draw = random.Random(seed)
        self._threads: list[threading.Thread] = []
        self.told: list[str] = []

    def strike(self) -> None:
        """One fault now, and perhaps another while the ring is being formed again."""
        self._one()
        if self._draw.random() < 0.4:
            self._later(self._draw.uniform(0.0, 4.0), self._one)

    def over(self) -> None:
        """Wait until all that was begun has been done."""
        for thread in self._threads:
            thread.join(60.0)
            assert not thread.is_alive()

    def _one(self) -> None:
        rank = self._draw.randrange(len(self._ring.specs))
        kind = self._draw.choice(["kill", "kill", "terminate", "stop"]) if rank else "stop"
        self.told.append(f"{kind} rank {rank}")
        if kind == "stop":
            pid, pause_s = self._ring.pid(rank), self._draw.choice([0.5, 6.5])
            os.kill(pid, signal.SIGSTOP)
            self._later(pause_s, lambda: _go_on(pid))
            return
        daemon = self._ring.daemons[rank - 1]
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGKILL if kind == "kill" else signal.SIGTERM)
        daemon.process.wait(10.0)
        self._later(self._draw.choice([0.0, 1.5]), lambda: self._restart(rank))

    def _restart(self, rank: int) -> None:
        if self._ring.daemons[rank - 1].process.poll() is not None:  # twice killed is once started
            self._ring.daemons[rank - 1] = self._ring.daemon(self._ring.specs[rank])

    def _later(self, pause_s: float, what: Callable[[], None]) -> None:
        def wait() -> None:
            time.sleep(pause_s)
            what()

        thread = threading.Thread(target=wait, daemon=True)
        self._threads.append(thread)
        thread.start()


@pytest.mark.timeout(90 * RUNS + 60)
@pytest.mark.parametrize("world_size", [2, 3, 4] if RUNS > 10 else [3])
def test_answers_are_the_same_whatever_befalls_the_ranks(tiny_llama: Path, tmp_path: Path, world_size: int) -> None:
    with process_ring(str(tiny_llama), world_size, tmp_path, settings=SETTINGS, rejoin_timeout_s=60.0) as ring:
        undisturbed = answers(ring.client)
        for run in range(RUNS):
            seed = 1000 * world_size + run
            faults = Faults(ring, seed)
            after = random.Random(seed).choice([1, 2, 60, 150, 390])
            began = time.monotonic()
            try:
                assert answers(ring.client, after, faults.strike) == undisturbed
            except BaseException:
                print(f"seed {seed}: {', '.join(faults.told)} after {after} tokens", ring.said(), sep="\n")
                raise
            faults.over()
            print(f"seed {seed}: {', '.join(faults.told)} after {after} tokens: {time.monotonic() - began:.1f} s")


def _go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
        os.kill(pid, signal.SIGCONT)
