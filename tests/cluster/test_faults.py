"""A rank dies, stops or is cut off in the middle of an answer: every other one ends soon and names it."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from ringlm.cluster.settings import Settings
from ringlm.engine.request import SamplingParams
from ringlm.errors import PeerLostError
from tests.cables import Cables
from tests.cluster.rings import ProcessRing, process_ring

WITHIN_S = 10.0
ENDLESS = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
SETTINGS = Settings(dtype="float32", context=4096)


def answer(ring: ProcessRing, tokens: int = 5) -> None:
    """Wait until an answer is under way."""
    ring.client.submit([1, 5, 9], ENDLESS)
    received = 0
    while received < tokens:
        event = ring.client.next_event(30.0)
        assert event is not None
        received += len(event.tokens)


def assert_survivors_name(ring: ProcessRing, victim: int, since: float) -> None:
    """Every rank but `victim` has ended within the limit, and named it."""
    deadline = since + WITHIN_S
    if victim != 0:
        with pytest.raises(PeerLostError, match=f"rank {victim} ") as caught:
            while time.monotonic() < deadline:
                ring.client.next_event(0.2)
        assert caught.value.rank == victim
    for rank, daemon in enumerate(ring.daemons, 1):
        if rank != victim:
            assert daemon.process.wait(max(0.1, deadline - time.monotonic())) == 1
            assert f"PeerLostError: rank {victim} " in daemon.said()


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize(("world_size", "victim"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_killed_or_stopped_rank_is_named_by_all(
    tiny_llama: Path, tmp_path: Path, world_size: int, victim: int, kind: signal.Signals
) -> None:
    with process_ring(str(tiny_llama), world_size, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        os.kill(ring.pid(victim), kind)
        assert_survivors_name(ring, victim, time.monotonic())


@pytest.mark.parametrize("how", ["cut", "frozen"])
def test_a_rank_behind_a_cut_or_frozen_cable_is_named(tiny_llama: Path, tmp_path: Path, how: str) -> None:
    with Cables() as cables, process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, cables=cables) as ring:
        answer(ring)
        since = time.monotonic()
        for relay in ring.relays.values():
            if how == "cut":
                relay.cut()
            else:
                relay.weather.stalled = True
        assert_survivors_name(ring, 1, since)


def test_daemons_end_with_0_when_rank_0_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        ring.client.close()
        for daemon in ring.daemons:
            assert daemon.process.wait(10) == 0
            assert daemon.said() == ""


def test_the_end_of_the_frontend_ends_every_rank(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        ring.client._channel.close()  # what the engine sees when its frontend is killed
        assert ring.client._processes[0].wait(10) == 1
        assert ring.daemons[0].process.wait(10) == 1
        assert "rank 0 failed: its frontend ended" in ring.daemons[0].said()


def test_a_silent_frontend_counts_as_a_stopped_rank_0(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        since = time.monotonic()
        ring.client._closing.set()  # no more pings, as when the process is stopped
        assert ring.daemons[0].process.wait(WITHIN_S) == 1
        assert "rank 0 " in ring.daemons[0].said()
        assert time.monotonic() - since < WITHIN_S
        ring.client._closing.clear()


def test_an_exception_on_a_daemon_reaches_rank_0_with_its_words(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        os.kill(ring.pid(1), signal.SIGTERM)
        with pytest.raises(PeerLostError, match="rank 1 failed: it exited with status 143"):
            while True:
                assert ring.client.next_event(10.0) is not None
