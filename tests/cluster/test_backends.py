"""Engines over gloo: the same tokens as over the ring, and a lost rank named as soon."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from ringlm.cluster.client import EngineClient
from ringlm.cluster.local import free_ports
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError
from ringlm.ring.address import Address
from tests.cluster.rings import ProcessRing, process_ring
from tests.cluster.test_faults import WITHIN_S, assert_lost_ranks_are_named, assert_survivors_name

GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
SAMPLED = SamplingParams(max_tokens=8, temperature=1.0, top_p=0.9, seed=3, ignore_eos=True)


def settings(backend: str) -> Settings:
    return Settings(dtype="float32", context=4096, backend=backend)


def tokens(ring: ProcessRing) -> list[list[int]]:
    """Of a greedy and a sampled request, side by side."""
    ids = [ring.client.submit([1, 5, 9, 2], params) for params in (GREEDY, SAMPLED)]
    found: dict[int, list[int]] = {one: [] for one in ids}
    left = set(ids)
    while left:
        event = ring.client.next_event(90.0)
        assert event is not None
        found[event.id] += event.tokens
        if event.finish_reason is not None:
            assert event.ring_s > 0
            left.discard(event.id)
    return [found[one] for one in ids]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_same_tokens_as_over_the_ring(tiny_llama: Path, tmp_path: Path, world_size: int) -> None:
    said = []
    for backend in ("ring", "gloo"):
        with process_ring(str(tiny_llama), world_size, tmp_path, settings=settings(backend)) as ring:
            said.append(tokens(ring))
            ring.client.close()
            for daemon in ring.daemons:
                assert daemon.process.wait(WITHIN_S) == 0
                assert daemon.said() == ""
    assert said[0] == said[1]


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_rank_is_named_by_all(tiny_llama: Path, tmp_path: Path, kind: signal.Signals) -> None:
    assert_lost_ranks_are_named(tiny_llama, tmp_path, settings("gloo"), kind, [(2, 0), (2, 1), (3, 1)])


def test_a_rank_that_is_lost_while_all_are_idle_is_named(tiny_llama: Path, tmp_path: Path) -> None:
    with process_ring(str(tiny_llama), 3, tmp_path, settings=settings("gloo")) as ring:
        tokens(ring)
        ring.daemons[1].process.kill()
        assert_survivors_name(ring, 2)


def test_the_group_meets_at_the_master_where_one_is_given(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.cluster import rings

    master = Address("127.0.0.1", free_ports(1)[0])
    local_ring = rings.local_ring
    monkeypatch.setattr(rings, "local_ring", lambda n: [ring.replace(master=master) for ring in local_ring(n)])
    with process_ring(str(tiny_llama), 2, tmp_path, settings=settings("gloo")) as ring:
        assert len(tokens(ring)[0]) == 24
        with pytest.raises(OSError, match="in use"):
            socket.create_server(master)


def test_nccl_without_cuda_is_refused(tiny_llama: Path) -> None:
    engine = EngineSpec(model=str(tiny_llama), settings=settings("nccl"), local_ranks=2, device="cpu")
    with pytest.raises(ConfigError, match="--backend nccl needs CUDA on every rank, and rank 0 computes on cpu"):
        EngineClient.start(engine)
