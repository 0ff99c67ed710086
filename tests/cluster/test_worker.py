"""What a rank's heartbeat says of it: that it computes, or that it waits for others."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from ringlm.cluster import worker
from ringlm.cluster.local import local_ring
from ringlm.cluster.spec import EngineSpec
from ringlm.cluster.worker import Worker


def test_a_daemon_that_hangs_in_a_step_does_not_claim_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a busy rank whose counter stands still is found stuck."""
    heard: list[tuple[int, bool]] = []
    ring = SimpleNamespace(sequence=7, waiting=False, close=lambda: None)
    daemon = Worker(EngineSpec(model="", ring=local_ring(2)[1]), None)

    def start(self: Worker) -> SimpleNamespace:
        self.ring = ring
        heard.append(self._progress())  # loading may take any time
        return SimpleNamespace(runner=None, comm=ring)

    def follow(runner: object, comm: object) -> None:
        ring.waiting = True
        heard.append(daemon._progress())  # the next step is rank 0's to send
        ring.waiting = False
        heard.append(daemon._progress())

    monkeypatch.setattr(Worker, "_start", start)
    monkeypatch.setattr(worker, "follow", follow)
    daemon.run()
    assert heard == [(7, False), (7, False), (7, True)]
