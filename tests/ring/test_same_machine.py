"""Links between ranks of one machine: Unix sockets where there are some, TCP where not, the same for who uses them."""

from __future__ import annotations

import socket
import sys
from functools import partial
from unittest import mock

import pytest
import torch

from ringlm.errors import PeerLostError
from ringlm.ring import Ring, RingConfig, connect, same_machine
from ringlm.ring.address import Address, local_addresses
from ringlm.ring.sockets import listen
from tests.ring.helpers import configs, each, free_ports, thread_ring, together

linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has Unix sockets without files")


def families(ring: Ring) -> set[socket.AddressFamily]:
    """Of the links, once they have carried sums of one frame and of many."""
    for length in (3, 1 << 20):
        ours = torch.full((length,), float(ring.rank))
        assert ring.all_reduce(ours)[-1].item() == sum(range(ring.world_size))
    return {link.sock.family for link in ring._links.values()}


@linux
def test_links_are_unix_sockets() -> None:
    with thread_ring(3) as rings:
        assert each(rings, families) == [{socket.AF_UNIX}] * 3


def test_tcp_serves_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with thread_ring(3) as rings:
        assert each(rings, families) == [{socket.AF_INET}] * 3


@linux
def test_tcp_serves_where_the_name_is_taken() -> None:
    rings = configs(2)
    with socket.socket(socket.AF_UNIX) as taken:  # bound, and nobody listens
        taken.bind(same_machine._name("127.0.0.1", rings[1].port))
        assert together(*(partial(joins, config) for config in rings)) == [{socket.AF_INET}] * 2


@linux
@pytest.mark.parametrize("host", ["localhost", "127.0.0.2", "own"])
def test_every_address_of_this_machine_will_do(host: str) -> None:
    if host == "own":
        host = next((address for address in local_addresses() if not address.startswith("127.")), "")
        if not host:
            pytest.skip("this machine has no network")
    one, other = free_ports(2)
    rings = [
        RingConfig(rank=0, world_size=2, port=one, right=Address(host, other), secret=b"s", connect_timeout_s=90),
        RingConfig(rank=1, world_size=2, port=other, right=Address(host, one), secret=b"s", connect_timeout_s=90),
    ]
    assert together(*(partial(joins, config) for config in rings)) == [{socket.AF_UNIX}] * 2


@linux
def test_nobody_answers_for_a_connection_to_another_machine() -> None:
    sockets = listen(0, beyond_loopback=True, interface=None)  # the wildcard would answer for any
    peer = mock.Mock(family=socket.AF_INET)
    try:
        for host, here in (("203.0.113.7", False), ("127.0.0.1", True)):
            peer.getpeername.return_value = (host, sockets[0].getsockname()[1])
            found = same_machine.connect_beside(peer, 1.0)
            assert (found is not None) == here
            if found is not None:
                found.close()
    finally:
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_rank_that_leaves_is_named_over_either(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)

    def body(ring: Ring) -> None:
        if ring.rank == 1:
            ring.close()
            return
        with pytest.raises(PeerLostError, match="rank 1"):
            while True:
                ring.all_reduce(torch.zeros(1 << 18))

    with thread_ring(2) as rings:
        each(rings, body)


def joins(config: RingConfig) -> set[socket.AddressFamily]:
    with connect(config) as ring:
        found = families(ring)
        ring.barrier()
        return found
