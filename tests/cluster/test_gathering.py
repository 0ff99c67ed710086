"""Who joins is given a place by rank 0, or told why there is none."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from socket import socket

import msgspec
import pytest

from ringlm.cluster.gathering import Gathering
from ringlm.cluster.joining import Member, Seat, join
from ringlm.cluster.loading import Loader
from ringlm.cluster.memory import Memory
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError
from ringlm.ring import RingConfig
from ringlm.ring.address import Address
from ringlm.ring.handshake import Place
from ringlm.ring.listener import open_listener

ENOUGH = 1 << 30
HERE = RingConfig(interface="127.0.0.1")
Joining = Callable[[int], "Future[Seat]"]


@pytest.fixture
def loader(tiny_llama: Path) -> Loader:
    return Loader(EngineSpec(model=str(tiny_llama), settings=Settings(context=640), awaits=3, threads=1))


@pytest.fixture
def gathering(loader: Loader) -> Iterator[Gathering]:
    listener = open_listener(HERE)
    gathering = Gathering(listener, loader, lambda words: None, lambda: None)
    yield gathering
    listener.close()


@pytest.fixture
def joining(gathering: Gathering, loader: Loader) -> Iterator[Joining]:
    """A rank that joins, with so many bytes free on a machine of its own."""
    port = gathering.rendezvous._listener.port

    def begin(free: int) -> Future[Seat]:
        def member(rank: int, epoch: int, link: socket) -> Member:
            capable = loader.capabilities(rank, Settings())
            machine = msgspec.structs.replace(capable, memory=Memory(f"{id(link)}", free))
            return Member(rank, epoch, Place(["127.0.0.1"], 1, "elsewhere"), machine)

        return pool.submit(join, [Address("127.0.0.1", port)], HERE, "", member, timeout_s=90.0)

    with ThreadPoolExecutor() as pool:
        yield begin
        gathering.rendezvous.close("the test is over.")  # which who still waits is told


def gather(gathering: Gathering, timeout_s: float) -> Seat:
    return gathering.gather(None, lambda: Place(["127.0.0.1"], 1, "here"), timeout_s)


def test_who_has_too_little_memory_is_refused_on_both_sides_and_another_is_awaited(
    gathering: Gathering, joining: Joining, caplog: pytest.LogCaptureFixture
) -> None:
    with ThreadPoolExecutor() as pool:
        ours = pool.submit(gather, gathering, 30.0)
        small, large = joining(10_000), joining(ENOUGH)
        arithmetic = r"rank \d needs 0\.\d MB \(weights 0\.\d MB, cache 0\.\d MB for 640 tokens\), and 0\.0 MB are free"
        with pytest.raises(ConfigError, match=arithmetic) as refused:
            small.result(90.0)
        assert f"turned away a rank that would join: {refused.value}" in caplog.text
        another = joining(ENOUGH)
        assert ours.result(90.0).world_size == 3
        assert {large.result(90.0).rank, another.result(90.0).rank} == {1, 2}


def test_a_ring_that_has_lost_a_rank_grows_by_one_that_fits(
    gathering: Gathering, joining: Joining, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    assert not gathering.grows()
    first = joining(ENOUGH)
    assert gather(gathering, 1.0).world_size == 2
    assert first.result(5.0) == Seat(1, 2, 1, first.result().right)
    assert "Going on with 2 of 3 ranks" in caplog.text
    assert not gathering.grows()
    with pytest.raises(ConfigError, match="are free there"):
        until(gathering.grows, joining(10_000))
    assert "formed again" not in caplog.text
    assert not gathering.growth.due  # a crowd of them is not looked at between all steps
    gathering.growth._due = 0.0
    joining(ENOUGH)
    until(gathering.grows)
    assert "The ring is formed again, of 3 ranks in place of 2." in caplog.text


def until(happens: Callable[[], bool], unless: Future[Seat] | None = None) -> None:
    """Ask, as rank 0 does between steps, for 20 s at most; raises what `unless` does."""
    pause = threading.Event()
    for _ in range(1000):
        if happens():
            return
        if unless is not None and unless.done():
            unless.result()
        pause.wait(0.02)
    pytest.fail("it has not happened")
