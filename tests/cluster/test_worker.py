"""What a rank's heartbeat says of it, and how often a ring is formed again."""

from __future__ import annotations

import contextlib
import time
from types import SimpleNamespace

import pytest

from ringlm.cluster import worker
from ringlm.cluster.local import local_ring
from ringlm.cluster.messages import Ready, Recovering
from ringlm.cluster.spec import EngineSpec
from ringlm.cluster.worker import Worker
from ringlm.errors import ConnectError, PeerLostError


def test_a_daemon_that_hangs_in_a_step_does_not_claim_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a busy rank whose counter stands still is found stuck."""
    heard: list[tuple[int, bool]] = []
    ring = SimpleNamespace(sequence=7, waiting=False)
    daemon = Worker(EngineSpec(model="", ring=local_ring(2)[1]), None)
    daemon.ring = ring  # type: ignore[assignment]
    heard.append(daemon._progress())  # loading may take any time

    def follow(runner: object, comm: object, epoch: int) -> None:
        ring.waiting = True
        heard.append(daemon._progress())  # the next step is rank 0's to send
        ring.waiting = False
        heard.append(daemon._progress())

    monkeypatch.setattr(worker, "follow", follow)
    ready = Ready("tiny", 2, 64, 100, [], "float32", "none", [])
    daemon._work(SimpleNamespace(runner=None, comm=ring, ready=ready), SimpleNamespace(measured=[]))  # type: ignore[arg-type]
    assert heard == [(7, False), (7, False), (7, True)]


def test_recoveries_without_progress_come_to_an_end() -> None:
    """A request that fells a rank each time must not be tried for ever; one token is enough to go on."""
    told: list[object] = []
    leader = SimpleNamespace(generated=0, dismissed=False, tell=told.append, waiting=contextlib.nullcontext)
    seating = SimpleNamespace(rejoin_timeout_s=30.0, next=lambda lost: None)
    rank0 = Worker(EngineSpec(model=""), None)
    rank0.leader, rank0._since = leader, time.monotonic()  # type: ignore[assignment]
    lost = PeerLostError("rank 1 is lost.", 1)
    for generated in (0, 0, 1, 1, 1):
        leader.generated = generated
        rank0._recover(seating, lost, "")  # type: ignore[arg-type]
    with pytest.raises(PeerLostError) as caught:
        rank0._recover(seating, lost, "")  # type: ignore[arg-type]
    assert caught.value is lost
    assert told == [Recovering(1, "rank 1 is lost.")] * 5


def test_nothing_is_recovered_where_nobody_waits_for_it() -> None:
    daemon = Worker(EngineSpec(model="", ring=local_ring(2)[1]), None)
    lost = PeerLostError("rank 0 is lost.", 0)
    with pytest.raises(PeerLostError) as caught:
        daemon._recover(SimpleNamespace(rejoin_timeout_s=0.0), lost, "")  # type: ignore[arg-type]
    assert caught.value is lost

    def unreachable(lost: PeerLostError) -> None:
        raise ConnectError("rank 0 could not be reached.")

    with pytest.raises(PeerLostError, match=r"rank 0 is lost. The ring was not formed again: rank 0 could not") as both:
        daemon._recover(SimpleNamespace(rejoin_timeout_s=1.0, next=unreachable), lost, "")  # type: ignore[arg-type]
    assert both.value.rank == 0
