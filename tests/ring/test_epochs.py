"""Rings that follow each other on the same ports, and whoever comes to the wrong one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from ringlm.errors import ConnectError
from ringlm.ring import Ring, RingConfig, connect
from ringlm.ring.handshake import RefusedError
from ringlm.ring.listener import Listener, open_listener
from tests.ring.helpers import attempt, configs, each, together


@contextlib.contextmanager
def listening(ranks: list[RingConfig]) -> Iterator[list[Listener]]:
    listeners = [open_listener(config) for config in ranks]
    try:
        yield listeners
    finally:
        for listener in listeners:
            listener.close()


def form(ranks: list[RingConfig], listeners: list[Listener], epochs: list[int]) -> list[Ring | BaseException]:
    """What each rank gets: its ring, or why not."""
    return attempt(
        *(
            lambda config=config, listener=listener, epoch=epoch: connect(config, listener=listener, epoch=epoch)
            for config, listener, epoch in zip(ranks, listeners, epochs, strict=True)
        )
    )


def close(rings: list[Ring | BaseException]) -> None:
    together(*(ring.close for ring in rings if isinstance(ring, Ring)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_one_ring_after_the_other_on_the_same_ports(world_size: int) -> None:
    ranks = configs(world_size)
    with listening(ranks) as listeners:
        for epoch in (0, 1, 5):
            rings = form(ranks, listeners, [epoch] * world_size)
            sums = each(rings, lambda ring: ring.all_reduce(torch.full((3,), float(ring.rank + 1))))
            assert all(sum_.tolist() == [world_size * (world_size + 1) / 2] * 3 for sum_ in sums)
            assert [ring.epoch for ring in rings] == [epoch] * world_size
            close(rings)


def test_ranks_of_two_epochs_refuse_each_other_and_name_both() -> None:
    ranks = configs(2, connect_timeout_s=4.0)
    with listening(ranks) as listeners:
        first, second = form(ranks, listeners, [2, 1])
    # Who is behind will not get there; who is ahead waits until its time is up.
    assert isinstance(second, RefusedError)
    assert "rank 1 is in epoch 1, this ring in epoch 2." in str(second)
    assert isinstance(first, ConnectError)
    assert "rank 0 is in epoch 2, this ring in epoch 1." in str(first)


def test_a_newcomer_hears_where_to_join_and_the_ring_goes_on() -> None:
    ranks = configs(3)
    with listening(ranks) as listeners:
        for epoch in (0, 1):
            rings = form(ranks, listeners, [epoch] * 3)
            each(rings, lambda ring: ring.barrier())
            if epoch == 0:
                close(rings)
        listeners[2].join_at = rings[2].first
        outcome = attempt(lambda: connect(ranks[1].replace(port=0), epoch=0))[0]
        assert isinstance(outcome, RefusedError)
        assert "rank 1 is in epoch 0, this ring in epoch 1." in str(outcome)
        assert outcome.join is not None
        assert outcome.join.port == ranks[0].port
        each(rings, lambda ring: ring.barrier())
        close(rings)


def test_a_rank_twice_is_refused_by_any_of_its_links() -> None:
    """Of two ranks only one keeps a ring link, but both keep the control link."""
    ranks = configs(2)
    with listening(ranks) as listeners:
        rings = form(ranks, listeners, [0, 0])
        listeners[0].join_at = rings[0].first
        outcome = attempt(lambda: connect(ranks[1].replace(port=0)))[0]
        assert isinstance(outcome, RefusedError)
        assert "rank 1 is connected to rank 0 already; give every rank a number of its own." in str(outcome)
        each(rings, lambda ring: ring.barrier())
        close(rings)
