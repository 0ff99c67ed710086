"""Links that only measure: what they find, who is answered, and that they end."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from ringlm.errors import AuthenticationError, ConnectError
from ringlm.ring import RingConfig
from ringlm.ring import gauge as gauges
from ringlm.ring.address import Address
from ringlm.ring.gauge import Gauges, gauge
from ringlm.ring.listener import Listener, open_listener
from ringlm.ring.seal import Connection
from tests.ring.helpers import together

ONE = RingConfig(secret=b"one")


@pytest.fixture
def listener() -> Iterator[Listener]:
    listening, answering = open_listener(ONE), Gauges()
    listening.gauges = answering
    try:
        yield listening
    finally:
        listening.close()
        answering.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "ringlm-gauge"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_link_is_measured_both_ways(listener: Listener, host: str) -> None:
    there = Address(host, listener.port)
    found = gauge([there], ONE)
    assert found.far == there
    assert 0 < found.round_trip_s < 1
    assert found.out_bytes_per_s > 1e6 < found.in_bytes_per_s
    assert found.bytes_per_s == min(found.out_bytes_per_s, found.in_bytes_per_s)


def test_several_are_measured_at_once(listener: Listener) -> None:
    there = Address("127.0.0.1", listener.port)
    assert len(together(*[lambda: gauge([there], ONE)] * 3)) == 3


def test_another_secret_measures_nothing(listener: Listener) -> None:
    with pytest.raises((AuthenticationError, ConnectError), match="another secret"):
        gauge([Address("127.0.0.1", listener.port)], RingConfig(secret=b"other"))


def test_nobody_is_there_or_answers(listener: Listener) -> None:
    there = Address("127.0.0.1", listener.port)
    listener.gauges = None
    with pytest.raises(ConnectError, match="no ring is being formed here"):
        gauge([there], ONE)
    listener.close()
    with pytest.raises(ConnectError, match="could not be reached"):
        gauge([there], ONE)
    with pytest.raises(ConnectError, match="no address"):
        gauge([], ONE)


class Stalls(Gauges):
    """Takes the link, and says nothing."""

    def receive(self, hello: object, link: Connection) -> None:
        self.kept = link


def test_a_link_that_stalls_ends_in_time(listener: Listener, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gauges, "LIMIT_S", 0.5)
    listener.gauges = stalls = Stalls()
    with pytest.raises(ConnectError, match=r"was not measured: it is too slow to be measured in 0\.5 s"):
        gauge([Address("127.0.0.1", listener.port)], ONE)
    stalls.kept.sock.close()


@pytest.mark.parametrize(
    "request_", [b"x\x01\0\0\0", b"t\0\0\0\0", b"t\xff\xff\xff\xff", b"g\0\0\0\0", b"g\1\0\0\4", b""], ids=repr
)
def test_what_is_no_request_ends_the_link(request_: bytes) -> None:
    """Of sizes also: none, and more than a round may have."""
    ours, theirs = socket.socketpair()
    answering = Gauges()
    answering.receive(None, Connection(theirs))  # type: ignore[arg-type]
    with ours:
        ours.settimeout(90.0)
        ours.sendall(request_)
        if not request_:
            ours.shutdown(socket.SHUT_WR)
        assert ours.recv(1) == b""
    answering.close()


def test_those_that_are_answered_end_with_the_listener() -> None:
    answering = Gauges()
    pairs = [socket.socketpair() for _ in range(3)]
    for _, theirs in pairs:
        answering.receive(None, Connection(theirs))  # type: ignore[arg-type]
    answering.close()
    for ours, _ in pairs:
        ours.settimeout(90.0)
        assert ours.recv(1) == b""
        ours.close()
    late, theirs = socket.socketpair()
    answering.receive(None, Connection(theirs))  # type: ignore[arg-type]
    assert late.recv(1) == b""
    late.close()
