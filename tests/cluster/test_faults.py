"""A rank dies, stops or is cut off in the middle of an answer: every other one ends soon and names it."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest

from ringlm.cluster.settings import Settings
from ringlm.engine.request import SamplingParams
from ringlm.errors import PeerLostError
from tests.cables import Cables
from tests.cluster.rings import ProcessRing, process_ring

WITHIN_S = 60.0  # on a machine with other work, too
ENDLESS = SamplingParams(max_tokens=4000, temperature=0, ignore_eos=True)
SETTINGS = Settings(dtype="float32", context=4096)


def answer(ring: ProcessRing, params: SamplingParams = ENDLESS) -> None:
    """Wait until an answer is under way."""
    ring.client.submit([1, 5, 9], params)
    received = 0
    while received < 5:
        event = ring.client.next_event(90.0)
        assert event is not None
        received += len(event.tokens)


def assert_survivors_name(ring: ProcessRing, victim: int) -> None:
    """Every rank but `victim` ends, and names it."""
    if victim != 0:
        with pytest.raises(PeerLostError, match=f"rank {victim} ") as caught:
            while ring.client.next_event(WITHIN_S) is not None:
                pass
        assert caught.value.rank == victim
    for rank, daemon in enumerate(ring.daemons, 1):
        if rank != victim:
            assert daemon.process.wait(WITHIN_S) == 1
            assert f"PeerLostError: rank {victim} " in daemon.said()


def assert_lost_ranks_are_named(
    model: Path, folder: Path, settings: Settings, kind: signal.Signals, places: list[tuple[int, int]]
) -> None:
    """In a ring for each of `places`, which are a world size and the rank to be lost amid an answer. They stand side by
    side, since it takes its time until silence is no longer borne."""
    with contextlib.ExitStack() as stack:
        rings = []
        for world_size, victim in places:
            own = folder / f"{world_size}-{victim}"
            own.mkdir()
            ring = stack.enter_context(process_ring(str(model), world_size, own, settings=settings))
            answer(ring)
            os.kill(ring.pid(victim), kind)
            rings.append((ring, victim))
        for ring, victim in rings:
            assert_survivors_name(ring, victim)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_rank_is_named_by_all(tiny_llama: Path, tmp_path: Path, kind: signal.Signals) -> None:
    assert_lost_ranks_are_named(tiny_llama, tmp_path, SETTINGS, kind, [(2, 1), (3, 0), (3, 1), (3, 2)])


@pytest.mark.parametrize("how", ["cut", "frozen"])
def test_a_rank_behind_a_cut_or_frozen_cable_is_named(tiny_llama: Path, tmp_path: Path, how: str) -> None:
    with Cables() as cables, process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS, cables=cables) as ring:
        answer(ring)
        for relay in ring.relays.values():
            if how == "cut":
                relay.cut()
            else:
                relay.weather.stalled = True
        assert_survivors_name(ring, 1)


def test_daemons_end_with_0_when_rank_0_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        ring.client.close()
        for daemon in ring.daemons:
            assert daemon.process.wait(WITHIN_S) == 0
            assert daemon.said() == ""


def test_the_end_of_the_frontend_ends_every_rank(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        answer(ring)
        ring.client._channel.close()  # what the engine sees when its frontend is killed
        assert ring.client._processes[0].wait(WITHIN_S) == 1
        assert ring.daemons[0].process.wait(WITHIN_S) == 1
        assert "rank 0 failed: its frontend ended" in ring.daemons[0].said()


def test_a_silent_frontend_counts_as_a_stopped_rank_0(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        ring.client._closing.set()  # no more pings, as when the process is stopped
        assert ring.daemons[0].process.wait(WITHIN_S) == 1
        assert "rank 0 " in ring.daemons[0].said()
        ring.client._closing.clear()


def test_an_exception_on_a_daemon_reaches_rank_0_with_its_words(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 2, tmp_path, settings=SETTINGS) as ring:
        answer(ring, ENDLESS.replace(max_tokens=200))  # which a daemon that is told to end waits for
        os.kill(ring.pid(1), signal.SIGTERM)
        with pytest.raises(PeerLostError, match="rank 1 failed: it exited with status 143"):
            while ring.client.next_event(WITHIN_S) is not None:
                pass
