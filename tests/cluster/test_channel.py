"""What a frontend and its engine process say to each other, where one of them does not listen or talks nonsense."""

from __future__ import annotations

import socket

import pytest

from ringlm.cluster import channel
from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.messages import Cancel, Ping, ToEngine


def test_whoever_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "SEND_S", 0.2)
    ours, theirs = socket.socketpair()
    sender: Channel[object] = Channel(ours, ToEngine)
    with theirs, pytest.raises(ChannelClosed, match="timed out"):
        while True:
            sender.send(*[Cancel(1)] * 1000)
    with pytest.raises(ChannelClosed):
        sender.receive()  # it is closed: half a message may have gone
    sender.close()


@pytest.mark.parametrize(
    "nonsense", [b"\xff\xff\xff\xff", b"\x01\x00\x00\x00\xc1", b"\x06\x00\x00\x00\x81\xa4type\xff"]
)
def test_nonsense_closes_it(nonsense: bytes) -> None:
    ours, theirs = socket.socketpair()
    hearer, speaker = Channel(ours, ToEngine), Channel(theirs, ToEngine)
    speaker.send(Ping(), Cancel(7))
    assert hearer.receive(5.0) == Ping()
    assert hearer.receive(5.0) == Cancel(7)
    assert hearer.receive(0.0) is None
    theirs.sendall(nonsense)
    with pytest.raises(ChannelClosed):
        hearer.receive(1.0)
    for one in (hearer, speaker):
        one.close()
