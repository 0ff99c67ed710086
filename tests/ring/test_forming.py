"""How a ring comes about: in any order of starts, over any addresses; and what is refused, on both sides."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from ringlm.errors import AuthenticationError, ConfigError, ConnectError
from ringlm.ring import RingConfig, connect, handshake
from ringlm.ring.address import Address
from ringlm.ring.cards import Card, reach
from ringlm.ring.handshake import Place, RefusedError
from ringlm.ring.sockets import listen
from tests.ring.helpers import attempt, configs, each, free_ports, together


def joins(config: RingConfig, after_s: float = 0.0, **options: Any) -> Callable[[], float]:
    """What one rank does: it starts late, joins, takes part in a sum, and leaves."""

    def run() -> float:
        time.sleep(after_s)
        with connect(config, **options) as ring:
            return ring.all_reduce(torch.ones(1)).item()

    return run


@pytest.mark.parametrize("delays", [(0.7, 0, 1.5), (1.5, 0.7, 0)])
def test_ranks_start_in_any_order(delays: tuple[float, ...]) -> None:
    ranks = [joins(config, delay) for config, delay in zip(configs(3, secret=b"s"), delays, strict=True)]
    assert together(*ranks) == [3.0] * 3


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_does_not_come_is_named(world_size: int) -> None:
    ranks = [joins(config) for config in configs(world_size, connect_timeout_s=0.6)[:-1]]
    outcomes = attempt(*ranks)
    assert all(isinstance(outcome, ConnectError) for outcome in outcomes)
    last = world_size - 1
    assert f"rank {last} could not be reached at 127.0.0.1:" in str(outcomes[-1])
    assert "Connection refused. Is it started, with the same ports" in str(outcomes[-1])
    if world_size == 3:
        assert "a neighbour of rank 0 left while the ring was being formed" in str(outcomes[0])


def test_a_neighbour_that_leaves_while_the_ring_forms() -> None:
    """Rank 0 does not come; when rank 1 gives up, rank 2 has its link and learns it at once."""
    _, second, third, fourth = configs(4)
    ranks = [joins(second.replace(connect_timeout_s=1.0)), joins(third), joins(fourth.replace(connect_timeout_s=2.0))]
    outcomes = attempt(*ranks, deadline_s=60.0)  # less than rank 2 would wait by itself
    assert "rank 0 did not connect to rank 1" in str(outcomes[0])
    assert "a neighbour of rank 2 left while the ring was being formed" in str(outcomes[1])
    assert "rank 0 could not be reached" in str(outcomes[2])


def test_a_rank_that_is_started_again_before_its_link_was_taken() -> None:
    first, second, third = configs(3)

    def gives_up_and_returns() -> float:
        assert isinstance(attempt(joins(second.replace(connect_timeout_s=0.5)))[0], ConnectError)
        return joins(second)()

    assert together(joins(first, 1.0), gives_up_and_returns, joins(third)) == [3.0] * 3


# -- refusals ----------------------------------------------------------------------------------

NEWCOMERS: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "another secret": (
        {"secret": b"b"},
        {},
        AuthenticationError,
        "holds another secret; give every rank the same RING_SECRET or --secret-file.",
    ),
    "no secret": ({"secret": None}, {}, AuthenticationError, "has a secret and"),
    "another world size": (
        {"world_size": 3},
        {},
        RefusedError,
        "rank 1 was started with world size 3, rank 0 with 2.",
    ),
    "the same rank": ({"rank": 0}, {}, RefusedError, "check the ports and the rank numbers."),
    "another model": (
        {},
        {"fingerprint": "b:shapes=1,weights=2,configuration=4"},
        RefusedError,
        "rank 1 has the model b and rank 0 a, whose weights and configuration differ; every rank needs the same",
    ),
}


@pytest.mark.parametrize("name", NEWCOMERS)
def test_a_stranger_is_refused_on_both_sides_and_disturbs_nobody(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """Rank 0 waits; a wrong rank 1 comes and is told why; then the right one comes."""
    changes, options, kind, words = NEWCOMERS[name]
    waiting, right = configs(2, secret=b"a")
    stranger = right.replace(port=free_ports(1)[0], **changes)
    came = threading.Event()

    def comes() -> BaseException:
        outcome = attempt(joins(stranger, **options))[0]
        came.set()
        assert isinstance(outcome, BaseException)
        return outcome

    def comes_later() -> float:
        assert came.wait(90.0)
        return joins(right, fingerprint="other/name:shapes=1,weights=1,configuration=3")()

    with caplog.at_level(logging.INFO, logger="ringlm.ring"):
        outcomes = attempt(joins(waiting, fingerprint="a:shapes=1,weights=1,configuration=3"), comes, comes_later)
    assert outcomes[0] == outcomes[2] == 2.0, outcomes
    assert isinstance(outcomes[1], kind)
    assert words in str(outcomes[1])
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert warnings[0].startswith(("turned away 127.0.0.1:", "turned away process "))
    assert words in warnings[0]


def test_another_protocol_number_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener of the future, and a dialler of today."""
    port = free_ports(1)[0]
    config = RingConfig(rank=0, world_size=2, port=free_ports(1)[0], right=Address("127.0.0.1", port))

    def future() -> bytes:
        with socket.create_server(("127.0.0.1", port)) as listening:
            sock, _ = listening.accept()
            with sock:
                heard = sock.recv(8)
                sock.sendall(handshake.MAGIC + bytes((handshake.PROTOCOL + 1, 0)))
                return heard

    outcomes = attempt(joins(config), future)
    assert outcomes[1] == handshake.MAGIC + bytes((handshake.PROTOCOL, 0))
    assert isinstance(outcomes[0], RefusedError)
    ours = handshake.PROTOCOL
    assert f"speaks protocol {ours + 1} and this rank protocol {ours}; install the same" in str(outcomes[0])


def test_another_program_at_the_neighbours_port() -> None:
    port = free_ports(1)[0]
    config = RingConfig(
        rank=0, world_size=2, port=free_ports(1)[0], right=Address("127.0.0.1", port), connect_timeout_s=0.5
    )

    def web_server() -> None:
        with socket.create_server(("127.0.0.1", port)) as listening:
            listening.settimeout(1.0)
            try:
                while True:
                    sock, _ = listening.accept()
                    with sock:
                        sock.sendall(b"HTTP/1.1 400 Bad Request\r\n")
            except OSError:
                return

    outcome = attempt(joins(config), web_server)[0]
    assert isinstance(outcome, ConnectError)
    assert "does not speak ringlm's protocol; another program listens there" in str(outcome)


def test_a_second_rank_of_the_same_number() -> None:
    """Rank 1 is connected and waits; another rank 1 is told so at once, and the ring forms."""
    first, second, third = configs(3)
    double = second.replace(port=free_ports(1)[0])
    asked = threading.Event()

    def doubles() -> BaseException:
        time.sleep(0.5)
        outcome = attempt(joins(double))[0]
        asked.set()
        assert isinstance(outcome, BaseException)
        return outcome

    def comes_last() -> float:
        assert asked.wait(90.0)
        return joins(first)()

    outcomes = attempt(comes_last, joins(second), joins(third), doubles)
    assert outcomes[:3] == [3.0] * 3
    assert str(outcomes[3]).endswith("rank 1 is connected to rank 2 already; give every rank a number of its own.")


def test_a_newcomer_is_refused_by_a_complete_ring() -> None:
    first, second = configs(2, secret=b"s")
    rings = together(lambda: connect(first), lambda: connect(second))
    newcomer = second.replace(port=free_ports(1)[0])
    outcome = attempt(joins(newcomer))[0]
    assert isinstance(outcome, ConnectError)
    assert "rank 1 is connected to rank 0 already; give every rank a number of its own." in str(outcome)
    assert each(rings, lambda ring: ring.all_reduce(torch.ones(1)).item()) == [2.0, 2.0]
    for ring in rings:
        ring.close()


# -- addresses ---------------------------------------------------------------------------------


def ring_at(host: str, world_size: int = 3, **changes: Any) -> list[RingConfig]:
    return [
        config.replace(right=Address(host, config.right.port), **changes)
        for config in configs(world_size)
        if config.right is not None
    ]


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2", "::1"])
@pytest.mark.parametrize("secret", [None, b"s"])
def test_ipv4_ipv6_and_names(host: str, secret: bytes | None) -> None:
    if host == "::1" and not has_ipv6():
        pytest.skip("no IPv6 here")
    if host == "127.0.0.2" and (secret is None or sys.platform != "linux"):
        pytest.skip("only 127.0.0.1 is bound")
    assert together(*(joins(config) for config in ring_at(host, secret=secret))) == [3.0] * 3


@pytest.mark.parametrize("interface", ["127.0.0.1", "lo", "::1"])
def test_on_one_interface(interface: str) -> None:
    if (interface == "lo" and sys.platform != "linux") or (interface == "::1" and not has_ipv6()):
        pytest.skip("not here")
    host = "::1" if interface == "::1" else "127.0.0.1"
    ranks = [joins(config) for config in ring_at(host, 2, interface=interface)]
    assert together(*ranks) == [2.0] * 2


def addresses(sockets: list[socket.socket]) -> list[str]:
    names = [sock.getsockname() for sock in sockets if sock.family != socket.AF_UNIX]
    found = sorted({str(name[0]) for name in names})
    assert len({name[1] for name in names}) == 1
    for sock in sockets:
        sock.close()
    return found


def test_only_loopback_is_bound_without_a_secret() -> None:
    both = has_ipv6()
    assert addresses(listen(0, beyond_loopback=False, interface=None)) == ["127.0.0.1", *(["::1"] if both else [])]
    assert addresses(listen(0, beyond_loopback=True, interface=None)) == ["0.0.0.0", *(["::"] if both else [])]
    with pytest.raises(ConfigError, match=r"--interface 0\.0\.0\.0 can be reached from other machines"):
        listen(0, beyond_loopback=False, interface="0.0.0.0")


def test_an_interface_that_is_not_here() -> None:
    for interface in ("nonsense0", "203.0.113.7"):
        with pytest.raises(ConfigError, match=r"no such network interface here|cannot listen on port 0 of 203\.0"):
            listen(0, beyond_loopback=True, interface=interface)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = RingConfig(rank=0, world_size=2, port=port, right=Address("127.0.0.1", 9))
        with pytest.raises(ConfigError, match=f"^port {port} is taken by another program; set RING_PORT to a free one"):
            connect(config)


def test_a_host_name_that_is_none() -> None:
    for host in ("nowhere.invalid", "a..b", "x" * 300):
        config = RingConfig(rank=0, world_size=2, port=0, right=Address(host, 9), secret=b"s", connect_timeout_s=0.1)
        with pytest.raises(ConnectError, match="rank 1 could not be reached at"):
            connect(config)


def card(rank: int, network: str, hosts: list[str], right: str) -> Card:
    return Card(rank, Place(hosts, 7600 + rank, network), (right, 7600 + (rank + 1) % 4), network)


def test_reaching_a_rank_whose_neighbours_are_on_its_own_machine() -> None:
    """Ranks 0, 1, 2 on machine a, rank 3 on b: rank 1 itself knows only loopback addresses."""
    cards = [
        card(0, "a", ["10.0.0.1", "127.0.0.1"], "127.0.0.1"),
        card(1, "a", ["127.0.0.1"], "127.0.0.1"),
        card(2, "a", ["10.0.0.1", "127.0.0.1"], "10.0.0.2"),
        card(3, "b", ["10.0.0.2"], "10.0.0.1"),
    ]
    assert reach(cards, 1, 3) == [Address("10.0.0.1", 7601)]
    assert reach(cards, 1, 2)[0] == Address("127.0.0.1", 7601)
    assert reach(cards, 3, 0) == [Address("10.0.0.2", 7603)]
    assert reach(cards, 0, 3)[0] == Address("10.0.0.1", 7600)


def test_a_card_with_an_impossible_port_is_refused() -> None:
    body = msgspec.msgpack.encode([1, [["a"], 70_000, "n"], ["a", 1], "m"])
    with pytest.raises(msgspec.ValidationError, match="<= 65535"):
        msgspec.msgpack.decode(body, type=Card)


def test_a_world_of_one_needs_nothing() -> None:
    with connect(RingConfig()) as ring:
        tensor = torch.ones(3)
        assert ring.all_reduce(tensor) is tensor
        assert ring.broadcast(tensor) is tensor
        assert ring.broadcast_bytes(b"x") == b"x"
        assert ring.gather_bytes(b"x") == [b"x"]
        assert (ring.rank, ring.world_size, ring.sequence) == (0, 1, 0)


# -- a master's store --------------------------------------------------------------------------

SCRIPT = """
import torch
from ringlm.ring import RingConfig, connect
config = RingConfig.from_env()
for _ in range(2):  # torchrun's store outlives the first ring
    with connect(config) as ring:
        total = ring.all_reduce(torch.full((3,), float(config.rank + 1)))
        assert total.tolist() == [3.0] * 3, total
open(f"done-{config.rank}", "w").close()
"""


def test_under_torchrun(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RING_", "MASTER_"))}
    environ["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.glob("done-*")} == {"done-0", "done-1"}


def test_with_a_master_and_no_torchrun() -> None:
    environ = {"WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    ranks = [RingConfig.from_env(environ | {"RANK": str(rank)}, connect_timeout_s=20.0) for rank in range(3)]
    for _ in range(2):
        assert together(joins(ranks[0], 0.3), joins(ranks[1]), joins(ranks[2])) == [3.0] * 3


def test_a_master_that_is_not_there() -> None:
    config = RingConfig(rank=1, world_size=2, master=Address("127.0.0.1", free_ports(1)[0]), connect_timeout_s=1.0)
    with pytest.raises(ConnectError, match=r"rank 1 found no rendezvous at the master 127\.0\.0\.1:"):
        connect(config)


def test_nothing_stays_open_when_a_ring_does_not_form() -> None:
    before = threading.active_count()
    (config, _) = configs(2, connect_timeout_s=0.2)
    for _ in range(3):
        with pytest.raises(ConnectError):
            connect(config)  # the same port each time
    assert threading.active_count() == before
