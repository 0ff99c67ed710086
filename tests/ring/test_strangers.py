"""What may come to a listening port that is no rank: nothing of it changes a ring that forms, or one that runs."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import msgspec
import pytest
import torch

from ringlm.ring import RingConfig, connect, forming, listener, strangers
from ringlm.ring.handshake import MAGIC, PROTOCOL
from ringlm.ring.strangers import gives_way, source
from tests.ring.helpers import attempt, configs, free_ports, together

PREAMBLE = MAGIC + bytes([PROTOCOL])


def call(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=90.0)


def hang_up(sock: socket.socket) -> None:
    """With a reset, as scanners do."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def port_scan(port: int) -> None:
    for _ in range(50):
        hang_up(call(port))


def garbage(port: int) -> None:
    for seed in range(10):
        with contextlib.suppress(OSError), call(port) as sock:
            sock.sendall(random.Random(seed).randbytes(5000))
            sock.recv(100)
    with contextlib.suppress(OSError), call(port) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: ring\r\n\r\n")
        sock.recv(100)


def half_open(port: int) -> None:
    """More than may wait at a time; some send a piece of a preamble."""
    socks = [call(port) for _ in range(listener.MAX_PENDING + 20)]
    for sock in socks[::2]:
        with contextlib.suppress(OSError):
            sock.sendall(b"ring")
    time.sleep(0.3)
    for sock in socks:
        sock.close()


def slow_loris(port: int) -> None:
    with contextlib.suppress(OSError), call(port) as sock:
        for byte in PREAMBLE + b"\x01" + b"\x00\x08" + bytes(30):
            sock.sendall(bytes([byte]))
            time.sleep(0.01)


def eighty_hellos(port: int) -> None:
    """With and without a secret's flag; well-formed, and nearly so. Forty at a time."""
    dice = random.Random(1)
    socks: list[socket.socket] = []
    for turn in range(80):
        hello: list[object] = [
            dice.choice(["ring", "mesh", "control", "weights", ""]),
            dice.choice([0, 1, 2, -1, 2**40]),
            dice.choice([0, 1, 7]),
            dice.choice([2, 3]),
            dice.choice([0, 1]),
            dice.choice(["", "x:1"]),
        ]
        if turn % 5 == 0:
            hello.pop()
        body = msgspec.msgpack.encode(hello)
        socks.append(call(port))
        with contextlib.suppress(OSError):
            socks[-1].sendall(PREAMBLE + bytes([turn % 2]) + len(body).to_bytes(2, "little") + body)
        if len(socks) == 40:
            for sock in socks:
                with contextlib.suppress(OSError), sock:
                    sock.recv(8)
                    sock.recv(300)
            socks.clear()


def wrong_secret(port: int) -> None:
    for rank, world_size in ((1, 2), (1, 3)):
        (config,) = [
            RingConfig(
                rank=rank,
                world_size=world_size,
                port=free_ports(1)[0],
                right=configs(2)[0].right,
                secret=b"wrong",
                connect_timeout_s=0.3,
            )
        ]
        right = config.right
        assert right is not None
        outcome = attempt(lambda config=config, right=right: connect(config.replace(right=right._replace(port=port))))[
            0
        ]
        assert type(outcome).__name__ == "AuthenticationError", outcome


STRANGERS = [port_scan, garbage, half_open, slow_loris, eighty_hellos, wrong_secret]


@contextlib.contextmanager
def visits(stranger: Callable[[int], None], ports: list[int]) -> Iterator[threading.Event]:
    """The stranger at every port, again and again, in the background; the event: each was visited once."""
    stop, visited = threading.Event(), threading.Event()

    def run() -> None:
        while not stop.is_set():
            for port in ports:
                stranger(port)
            visited.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield visited
    finally:
        stop.set()
        thread.join(90.0)
        assert not thread.is_alive()
        assert visited.is_set()


@pytest.mark.parametrize("stranger", STRANGERS, ids=lambda stranger: stranger.__name__)
def test_a_ring_forms_and_runs_as_if_nobody_had_come(
    stranger: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forming, "_LINGER_S", 0.0)  # a stranger's own affair
    monkeypatch.setattr(listener, "MAX_PENDING", 40)
    first, second = configs(2, secret=b"right")
    rings = []
    # Rank 0 waits for rank 1 while the stranger is at its port.
    waiting = threading.Thread(target=lambda: rings.append(connect(first)))
    waiting.start()
    time.sleep(0.1)
    with visits(stranger, [first.port]) as visited:
        assert visited.wait(90.0)
        rings.append(connect(second))
        waiting.join(90.0)
    assert len(rings) == 2
    with visits(stranger, [first.port, second.port]) as visited:
        while not visited.is_set():
            sums = together(*(lambda ring=ring: ring.all_reduce(torch.ones(1000)) for ring in rings))
            assert all(bool((total == 2).all()) for total in sums)
            time.sleep(0.01)  # the stranger is a thread of this process, too
    for ring in rings:
        ring.check()
        ring.close()


class Recorder:
    """A relay that keeps what passed, by connection, from the dialler to the listener."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self.heard: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listening.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listening.accept()
                try:
                    far = call(self._target)
                except OSError:
                    near.close()
                    continue
                far.settimeout(None)
                heard = bytearray()
                self.heard.append(heard)
                for source, sink, keep in ((near, far, heard), (far, near, bytearray())):
                    threading.Thread(target=self._forward, args=(source, sink, keep), daemon=True).start()

    @staticmethod
    def _forward(source: socket.socket, sink: socket.socket, keep: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                keep += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


def test_a_replayed_handshake_is_no_link(caplog: pytest.LogCaptureFixture) -> None:
    """Rank 1's links to rank 0 are recorded, and played again: to the ring that runs, and to the next one."""
    first, second = configs(2, secret=b"right")
    recorder = Recorder(first.port)
    assert second.right is not None
    through = second.replace(right=second.right._replace(port=recorder.port))

    def replay() -> None:
        for heard in recorder.heard:
            with contextlib.suppress(OSError), call(first.port) as sock:
                sock.sendall(heard)
                while sock.recv(1000):
                    pass

    rings = together(lambda: connect(first), lambda: connect(through))
    replay()
    for total in together(*(lambda ring=ring: ring.all_reduce(torch.ones(5)) for ring in rings)):
        assert total.tolist() == [2.0] * 5
    for ring in rings:
        ring.close()
    assert len(recorder.heard) >= 2  # ring and control

    def comes_after_the_replay() -> object:
        time.sleep(0.3)
        replay()
        return connect(second)

    rings = together(lambda: connect(first), comes_after_the_replay)
    for total in together(*(lambda ring=ring: ring.all_reduce(torch.ones(5)) for ring in rings)):
        assert total.tolist() == [2.0] * 5
    for ring in rings:
        ring.close()
    recorder.close()
    assert "another secret" in caplog.text


def test_who_keeps_silent_is_dropped_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listener, "HANDSHAKE_S", 0.3)
    first, second = configs(2)
    rings = together(lambda: connect(first), lambda: connect(second))
    with call(first.port) as silent, call(first.port) as slow:
        slow.sendall(b"ringlm")
        for sock in (silent, slow):
            sock.settimeout(90.0)
            assert sock.recv(1) == b""
    for ring in rings:
        ring.close()


def test_a_rank_joins_through_a_crowd() -> None:
    """Hundreds a second come and go, keep silent or talk nonsense, from the same address; a ring forms all the same."""
    first, second = configs(2, secret=b"right")
    rings: list[object] = []
    waiting = threading.Thread(target=lambda: rings.append(connect(first)))
    waiting.start()
    time.sleep(0.1)
    stop, held = threading.Event(), []

    def crowd() -> None:
        while not stop.wait(0.003):
            sock = call(first.port)
            held.append(sock)
            if len(held) % 3:
                sock.sendall(PREAMBLE + b"\x01\x40\x00" + bytes(64) if len(held) % 3 == 1 else b"nonsense")
            if len(held) > 600:
                held.pop(0).close()

    pests = threading.Thread(target=crowd)
    pests.start()
    try:
        time.sleep(1.0)
        rings.append(connect(second))
        waiting.join(90.0)
        assert len(rings) == 2
    finally:
        stop.set()
        pests.join()
        for each in (*held, *rings):
            each.close()  # type: ignore[attr-defined]


def test_the_busiest_source_gives_way() -> None:
    waiting = {1: "a", 2: "b", 3: "b", 4: "c", 5: "b"}
    assert gives_way(waiting) == 2
    assert gives_way({1: "a", 2: "b"}) == 1
    assert source("192.168.0.7") != source("192.168.0.8")
    assert source("2001:db8::1") == source("2001:db8::ffff:0:0:1") != source("2001:db8:0:1::1")


def test_a_crowd_is_one_until_it_has_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(strangers.time, "monotonic", lambda: now)
    crowd = strangers.Crowd()
    for _ in range(20):
        crowd.turned_away()
        assert not crowd.here
    for _ in range(500):
        crowd.turned_away()
    assert crowd.here
    now = 1.9
    assert crowd.here
    now = 2.1
    assert not crowd.here
