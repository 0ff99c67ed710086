"""A rank that dies, stops, fails or is cut off: every survivor names it, soon, and goes on doing so."""

from __future__ import annotations

import contextlib
import queue
import signal
import socket
import sys
import threading
import time
from typing import Any

import pytest
import torch

from ringlm.errors import PeerLostError
from ringlm.ring import Heartbeat, Ring
from ringlm.ring.control import ControlPlane
from ringlm.ring.seal import Connection
from tests.processes import DEADLINE_S, Failure
from tests.ring.helpers import ProcessRing, attempt, each, thread_ring

SILENCE_S = 3.0  # of a rank that is well, on a machine with other work, is shorter
PLACES = [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)]
places = pytest.mark.parametrize(("world_size", "victim"), PLACES)


def reduce_for_ever(ring: Ring, length: int) -> None:
    tensor = torch.zeros(length)
    while True:
        ring.all_reduce(tensor)


def reduce_and_pause(ring: Ring, pause_s: float) -> None:
    for _ in range(100):
        time.sleep(pause_s)
        ring.all_reduce(torch.zeros(10))


def check(ring: Ring) -> None:
    ring.check()


def leave(ring: Ring) -> None:
    ring.all_reduce(torch.zeros(10))
    sys.exit(3)


def names_the_victim(ring: ProcessRing, world_size: int, victim: int, kind: str = "PeerLostError") -> list[Failure]:
    """All survivors' failures, which they repeat when asked again."""
    survivors = [rank for rank in range(world_size) if rank != victim]
    failures: list[Any] = [ring.result(rank) for rank in survivors]
    for rank in survivors:
        ring.start(rank, check)
    failures += [ring.result(rank) for rank in survivors]
    for failure in failures:
        assert isinstance(failure, Failure)
        assert (failure.kind, failure.rank) == (kind, victim), failures
        assert failure.text.startswith(f"rank {victim} ")
    return failures


@pytest.mark.parametrize(("world_size", "victim", "length"), [*((*place, 10) for place in PLACES), (3, 1, 1_000_000)])
def test_killed_in_the_middle(world_size: int, victim: int, length: int) -> None:
    with ProcessRing(world_size) as ring:
        for rank in range(world_size):
            ring.start(rank, reduce_for_ever, length)
        time.sleep(0.2)
        ring.signal(victim, signal.SIGKILL)
        names_the_victim(ring, world_size, victim)


@pytest.mark.parametrize("victim", [0, 2])
def test_killed_while_the_others_are_idle(victim: int) -> None:
    with ProcessRing(3) as ring:
        ring.signal(victim, signal.SIGKILL)
        time.sleep(0.3)
        for rank in range(3):
            if rank != victim:
                ring.start(rank, check)
        names_the_victim(ring, 3, victim)


def test_stopped() -> None:
    """No link closes; only the silence of its heartbeat tells. When it goes on, it learns its fate."""
    with contextlib.ExitStack() as stack:
        stopped = []
        for world_size, victim in PLACES:  # all at once, since each takes as long as silence is borne
            ring = stack.enter_context(ProcessRing(world_size, heartbeat=(0.1, SILENCE_S, 60.0)))
            for rank in range(world_size):
                ring.start(rank, reduce_for_ever, 10)
            time.sleep(0.2)
            ring.signal(victim, signal.SIGSTOP)
            stopped.append((ring, world_size, victim))
        for ring, world_size, victim in stopped:
            for failure in names_the_victim(ring, world_size, victim):
                assert f"is lost: silent for {SILENCE_S:g} s; it is stopped, or cut off." in failure.text
            ring.signal(victim, signal.SIGCONT)
            assert ring.result(victim).kind == "PeerLostError"


@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (3, 1)])
def test_its_program_exits(world_size: int, victim: int) -> None:
    with ProcessRing(world_size) as ring:
        for rank in range(world_size):
            ring.start(rank, *((leave,) if rank == victim else (reduce_and_pause, 0.01)))
        for failure in names_the_victim(ring, world_size, victim):
            assert failure.text == f"rank {victim} failed: it exited with status 3"


@places
@pytest.mark.parametrize("how", ["fails", "leaves in order"])
def test_its_program_goes_no_further(world_size: int, victim: int, how: str) -> None:
    with thread_ring(world_size) as rings:

        def work(ring: Ring) -> None:
            ring.all_reduce(torch.zeros(10))
            if ring.rank != victim:
                reduce_for_ever(ring, 10)
            with ring:
                if how == "fails":
                    raise MemoryError("3 GB asked for")

        outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert isinstance(outcome, MemoryError) == (how == "fails")
        else:
            assert isinstance(outcome, PeerLostError)
            assert outcome.rank == victim
            words = (
                "failed: MemoryError: 3 GB asked for" if how == "fails" else "is lost: it has left the ring in order."
            )
            assert str(outcome).startswith(f"rank {victim} ")
            assert str(outcome).endswith(words)


@pytest.mark.parametrize(("world_size", "victim"), PLACES)
def test_late(world_size: int, victim: int) -> None:
    """Also where a rank waits for rank 0 only because rank 0 waits for the late one."""
    failed = threading.Semaphore(0)
    with thread_ring(world_size, timeout_s=0.3) as rings:

        def work(ring: Ring) -> None:
            ring.all_reduce(torch.ones(3))
            if ring.rank == victim:
                for _ in range(world_size - 1):
                    assert failed.acquire(timeout=90.0)
            try:
                while True:  # the late one's first may succeed: the others' bytes were there
                    ring.all_reduce(torch.ones(3))
            finally:
                failed.release()

        outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings))
    for outcome in outcomes:  # the late one hears it too
        assert type(outcome).__name__ == "CollectiveTimeoutError", outcomes
        assert outcome.rank == victim
        assert "did not take part in the collective in time" in str(outcome)


@places
def test_all_links_of_a_rank_shut(world_size: int, victim: int) -> None:
    with thread_ring(world_size) as rings:

        def work(ring: Ring) -> None:
            reduce_for_ever(ring, 10)

        def cut() -> None:
            time.sleep(0.2)
            control = rings[victim]._control
            assert control is not None
            sockets = [peer.sock for peer in control._peers.values()]
            sockets += [link.sock for link in rings[victim]._links.values()]
            with control._lock:  # the cable takes all at once: none carries what the rank says of the others
                for sock in sockets:
                    sock.shutdown(socket.SHUT_RDWR)

        outcomes = attempt(*(lambda ring=ring: work(ring) for ring in rings), cut)[:-1]
    for rank, outcome in enumerate(outcomes):
        assert isinstance(outcome, PeerLostError), outcomes
        assert outcome.rank == victim or rank == victim


def test_one_data_link_shut_ends_the_ring_on_every_rank() -> None:
    with thread_ring(3) as rings:

        def cut() -> None:
            time.sleep(0.2)
            rings[1]._mesh.links[2].shut()

        outcomes = attempt(*(lambda ring=ring: reduce_for_ever(ring, 10) for ring in rings), cut)[:-1]
    assert {outcome.rank for outcome in outcomes} <= {1, 2}
    assert all(isinstance(outcome, PeerLostError) for outcome in outcomes)


def test_stuck_while_it_claims_to_work() -> None:
    def busy() -> tuple[int, bool]:
        return 7, True

    with thread_ring(2, options={"heartbeat": Heartbeat(progress=busy, interval_s=0.05, stall_s=0.4)}) as rings:
        outcomes = attempt(lambda: rings[0].broadcast_bytes(None, root=1), lambda: time.sleep(1.0))
        assert isinstance(outcomes[0], PeerLostError)
        assert "is stuck: it answers, but its step has not moved for 0.4 s" in str(outcomes[0])


def test_a_heartbeat_that_is_held_back() -> None:
    """The frontend of rank 1 has stopped, so rank 1 keeps silent."""
    alive = {"rank 1": True}
    heartbeat = Heartbeat(alive=lambda: alive["rank 1"], interval_s=0.05, silence_s=1.5)
    with thread_ring(2, options={"heartbeat": heartbeat}) as rings:
        each(rings, lambda ring: ring.all_reduce(torch.ones(1)))
        alive["rank 1"] = False
        outcomes = attempt(*(lambda ring=ring: ring.broadcast_bytes(None, root=1 - ring.rank) for ring in rings))
        assert all("silent for 1.5 s" in str(outcome) for outcome in outcomes)


def test_a_heartbeat_callback_that_fails_ends_the_ring(recwarn: pytest.WarningsRecorder) -> None:
    def broken() -> bool:
        raise KeyError("frontend")

    with thread_ring(2, options={"heartbeat": Heartbeat(alive=broken)}) as rings:
        outcomes = attempt(*(lambda ring=ring: ring.broadcast_bytes(None, root=1 - ring.rank) for ring in rings))
        for outcome in outcomes:
            assert "its control thread met KeyError: 'frontend'" in str(outcome)


def test_last_words_reach_everybody_and_are_cut_to_size() -> None:
    with thread_ring(3) as rings:
        words = "out of memory: " + "é" * 5000

        def work(ring: Ring) -> None:
            if ring.rank == 1:
                ring.abort(words)
            ring.broadcast_bytes(None, root=1)

        outcomes = attempt(lambda: work(rings[0]), lambda: rings[1].abort(words), lambda: work(rings[2]))
    for outcome in (outcomes[0], outcomes[2]):
        assert outcome.rank == 1
        assert str(outcome) == f"rank 1 failed: {words}"[:1024]


def test_an_error_outside_of_a_collective_reaches_the_others() -> None:
    with thread_ring(2) as rings:

        def fails() -> None:
            with rings[1]:
                raise ZeroDivisionError("in the model")

        outcomes = attempt(lambda: rings[0].all_reduce(torch.ones(1)), fails)
    assert str(outcomes[0]) == "rank 1 failed: ZeroDivisionError: in the model"
    assert isinstance(outcomes[1], ZeroDivisionError)


def test_keyboard_interrupt_in_a_collective_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    with thread_ring(2) as (first, second):

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(second._mesh, "pump", interrupted)
        outcomes = attempt(lambda: first.broadcast_bytes(None, root=1), lambda: second.broadcast_bytes(b"x", root=1))
        assert isinstance(outcomes[1], KeyboardInterrupt)
        assert str(outcomes[0]) == "rank 1 failed: interrupted by its user"
        with pytest.raises(PeerLostError, match="rank 1 failed"):
            second.check()


# -- the control plane alone -------------------------------------------------------------------


class Star:
    """Three control planes over socket pairs, and what each was told of the end."""

    def __init__(self) -> None:
        a, b = socket.socketpair()
        c, d = socket.socketpair()
        self.sockets = {1: (a, b), 2: (c, d)}
        names = [f"rank {rank} (here)" for rank in range(3)]
        beat = Heartbeat(interval_s=0.05)
        self.planes = [
            ControlPlane(0, {1: Connection(a), 2: Connection(c)}, names, beat),
            ControlPlane(1, {0: Connection(b)}, names, beat),
            ControlPlane(2, {0: Connection(d)}, names, beat),
        ]
        self.told: list[list[Any]] = [[], [], []]
        for plane, told in zip(self.planes, self.told, strict=True):
            plane.start(lambda: b"", told.append)

    def wait(self) -> None:
        """Until every rank has been told."""
        deadline = time.monotonic() + 90.0
        while not all(self.told) and time.monotonic() < deadline:
            time.sleep(0.01)

    def __enter__(self) -> Star:
        return self

    def __exit__(self, *_: object) -> None:
        for plane in self.planes:
            plane.close()


def test_the_cause_wins_over_its_consequence() -> None:
    """Rank 2's link to rank 1 closes because rank 1 heard of rank 0's failure first."""
    with Star() as star:
        consequence = PeerLostError("rank 1 (here) is lost: its link was closed.", 1)

        def hears_late() -> None:
            time.sleep(0.2)
            star.planes[0].fail(PeerLostError("rank 0 failed: out of memory", 0))

        cause, _ = attempt(lambda: star.planes[2].settle(consequence), hears_late)
        assert (cause.rank, str(cause)) == (0, "rank 0 failed: out of memory")
        star.wait()
        assert [len(told) for told in star.told] == [1, 1, 1]  # each once


@pytest.mark.parametrize(
    "message",
    [b"\xff\xff", b"\x03\x00abc", b"\x01\x00\xc1", b"\x02\x00\x91\xa1", b"\x06\x00\x91\xa4\xff\xff\xff\xff"],
)
def test_a_malformed_control_message_ends_the_ring_and_names_its_sender(message: bytes) -> None:
    with Star() as star:
        star.sockets[1][1].send(message)
        star.wait()
        assert star.told[2][0].rank == 1
        assert "its control link " in str(star.told[2][0])


def test_a_peer_that_still_forms_the_ring_may_keep_silent() -> None:
    ours, theirs = socket.socketpair()
    told: queue.SimpleQueue[Any] = queue.SimpleQueue()
    beat = Heartbeat(interval_s=0.05, silence_s=0.1)
    began = time.monotonic()
    plane = ControlPlane(0, {1: Connection(ours)}, ["rank 0", "rank 1"], beat, patience_s=0.6)
    plane.start(lambda: b"", told.put)
    assert told.get(timeout=DEADLINE_S).rank == 1
    assert time.monotonic() - began > 0.6
    plane.close()
    theirs.close()


def test_closing_from_its_own_thread() -> None:
    """on_failure may close the plane whose thread it runs on."""
    ours, theirs = socket.socketpair()
    plane = ControlPlane(0, {1: Connection(ours)}, ["rank 0", "rank 1"], Heartbeat())
    told = []

    def on_failure(error: Any) -> None:
        told.append(error.rank)
        plane.close()

    plane.start(lambda: b"", on_failure)
    theirs.close()
    plane._thread.join(90.0)
    assert not plane._thread.is_alive()
    assert told == [1]
    plane.close()
