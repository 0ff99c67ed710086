"""Dead peers and timeouts, on every rank and by name; groups that follow each other; what torch loads by itself."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import ringlm.torch
from ringlm.errors import ConfigError, ConnectError
from ringlm.ring.address import is_loopback
from ringlm.torch import rendezvous
from ringlm.torch.rendezvous import meet
from tests.processes import DEADLINE_S, Failure
from tests.torch.ranks import Here, Ranks

N = 3
WAITS: dict[str, Callable[[Here], Any]] = {
    "all_reduce": lambda here: dist.all_reduce(torch.ones(3)),
    "a future": lambda here: dist.all_reduce(torch.ones(3), async_op=True).get_future().wait(),
    "recv": lambda here: dist.recv(torch.ones(3), 2),
    "recv from any": lambda here: dist.recv(torch.ones(3)),
}


def wait_for_ever(here: Here, how: str) -> None:
    if here.rank != 2:
        WAITS[how](here)
    time.sleep(60)


@pytest.mark.parametrize("how", ["all_reduce", "a future", "recv from any"])
def test_a_dead_peer_is_named(how: str, tmp_path: Path) -> None:
    with Ranks(N, tmp_path / "store", gloo=False) as ranks:
        for rank in range(N):
            ranks.start(rank, wait_for_ever, how)
        time.sleep(0.2)
        ranks.processes[2].kill()
        for rank in range(2):
            failure = ranks.result(rank)
            assert isinstance(failure, Failure)
            assert "rank 2" in failure.text
            assert "is lost" in failure.text
            if how != "a future":  # whose errors torch makes RuntimeErrors
                assert (failure.kind, failure.rank) == ("PeerLostError", 2)


def too_late(here: Here, how: str) -> Any:
    """Rank 2 does not come, and hears of it."""
    outcomes = []
    waits = {**WAITS, "monitored": monitored}
    try:
        if here.rank == 2:
            stop = time.monotonic() + 90
            while time.monotonic() < stop:
                dist.group.WORLD._ring.check()
                time.sleep(0.02)
        waits[how](here)
    except Exception as error:  # noqa: BLE001
        outcomes.append(str(error))
    try:
        dist.all_reduce(torch.ones(1))
    except Exception as error:  # noqa: BLE001
        outcomes.append(str(error))
    return outcomes


def monitored(here: Here) -> None:
    ringlm.torch.monitored_barrier(timeout=datetime.timedelta(seconds=0.5), wait_all_ranks=True)


@pytest.mark.parametrize("how", ["recv", "monitored"])
def test_a_late_peer_is_named_on_every_rank(how: str, tmp_path: Path) -> None:
    with Ranks(N, tmp_path / "store", gloo=False) as ranks:
        for rank in range(N):
            ranks.start(rank, shorter, how)
        for rank in range(N):
            told = ranks.result(rank)
            assert not isinstance(told, Failure), told.text
            assert len(told) == 2
            for text in told:
                assert "rank 2" in text, told


def shorter(here: Here, how: str) -> Any:
    dist.barrier()
    dist.group.WORLD.set_timeout(datetime.timedelta(seconds=0.5))
    return too_late(here, how)


def starts_again(here: Here, store: str) -> Any:
    """Groups that follow each other on one store, a wait with a limit of its own, and one of a part that fails."""
    dist.destroy_process_group()
    found = []
    for _ in range(2):
        kept = dist.FileStore(store, N)
        dist.init_process_group("cpu:ring,cuda:gloo", store=kept, rank=here.rank, world_size=N)
        total = torch.ones(1)
        dist.all_reduce(total)
        found.append(total.item())
        found.append(dist.get_backend_config())
        dist.destroy_process_group()
    dist.init_process_group("ring", store=dist.FileStore(store, N), rank=here.rank, world_size=N)
    part = dist.new_group([1, 2])
    if here.rank == 1:
        handle = dist.irecv(torch.ones(1), 2, group=part)
        with pytest.raises(TimeoutError):
            handle.wait(datetime.timedelta(seconds=0.05))
    dist.barrier()
    if here.rank == 2:
        dist.destroy_process_group(part)
    elif here.rank == 1:
        try:
            handle.wait()
        except Exception as error:  # noqa: BLE001
            found.append(str(error))
    dist.barrier()  # the whole is well
    return found


def test_groups_that_follow_each_other(tmp_path: Path) -> None:
    with Ranks(N, tmp_path / "store", gloo=False) as ranks:
        found = ranks.call(starts_again, str(tmp_path / "next"))
        assert [outcome[:4] for outcome in found] == [[3.0, "cpu:ring,cuda:gloo"] * 2] * N
        assert "has left the ring in order. In this group of ranks [1, 2] rank 1 is rank 2 of all." in found[1][4]


def test_torch_finds_the_backend_and_loads_nothing_for_it() -> None:
    """`import torch` does; what it costs is what it imports."""
    names = "(name for name in sys.modules if name.partition('.')[0] in ('ringlm', 'numba', 'transformers', 'msgspec'))"
    code = f"import sys, torch; print(torch.distributed.Backend.RING, *sorted{names})"
    plain = {name: value for name, value in os.environ.items() if name != "TORCH_DEVICE_BACKEND_AUTOLOAD"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=plain, check=True)
    assert done.stdout.split() == ["ring", "ringlm", "ringlm.torch"]


def test_a_torch_that_refuses_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise TypeError("unexpected keyword argument 'devices'")

    monkeypatch.setattr(ringlm.torch, "_register", refuse)
    with pytest.warns(UserWarning, match="backend 'ring' cannot be had here: unexpected keyword"):
        ringlm.torch.autoload()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ringlm.torch.autoload()  # again


def test_nobody_comes() -> None:
    with pytest.raises(ConnectError, match=r"rank 0 has not come to the store of torch\.distributed in time"):
        meet(dist.HashStore(), 1, 2, 0.2)


def test_where_a_rank_listens(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the interface from which the store is reached, and on loopback's for one that is a file."""
    monkeypatch.delenv("RING_INTERFACE", raising=False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    file = dist.FileStore(str(tmp_path / "store"), 1)
    assert rendezvous._host(file) == "127.0.0.1"
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")  # this machine, too
    assert rendezvous._host(dist.PrefixStore("a", file)).startswith("127.")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    served = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    assert is_loopback(rendezvous._host(dist.PrefixStore("a", dist.PrefixStore("b", served))))
    monkeypatch.setenv("RING_INTERFACE", "lo")
    assert rendezvous._host(file) == "127.0.0.1"
    monkeypatch.setenv("RING_INTERFACE", "nowhere0")
    with pytest.raises(ConfigError, match="nowhere0: no such network interface"):
        rendezvous._host(file)


def with_secret(here: Here, store: str) -> str:
    """Rank 1 can read the store, and does not know what the others have been told."""
    os.environ["RING_SECRET"] = "wrong" if here.rank == 1 else "right"
    limit = datetime.timedelta(seconds=DEADLINE_S)
    dist.init_process_group("ring", init_method=f"file://{store}", rank=here.rank, world_size=2, timeout=limit)
    return "formed"


def test_a_secret_that_is_not_in_the_store(tmp_path: Path) -> None:
    with Ranks(2, None) as ranks:
        for rank in range(2):
            ranks.start(rank, with_secret, str(tmp_path / "store"))
        assert "AuthenticationError" in {ranks.result(rank).kind for rank in range(2)}
