"""The opening of a link, without sockets: both sides driven by hand, with whatever a stranger may send."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.errors import AuthenticationError, ConnectError, RingError
from ringlm.ring import handshake
from ringlm.ring.handshake import (
    MAGIC,
    MAX_MESSAGE,
    PROTOCOL,
    Agreed,
    Handshake,
    Hello,
    RefusedError,
    Terms,
    initiate,
    respond,
)

PREAMBLE = MAGIC + bytes([PROTOCOL])
HELLO = Hello("ring", 1, 0, 2, 0, "tiny:0123")
SECRETS = st.sampled_from([None, b"secret"])


def accept(hello: Hello) -> int:
    """Everybody is welcome, by the rank that was meant."""
    return hello.to


class Side:
    """One side's generator, between the bytes that came and those that go."""

    def __init__(self, generator: Handshake) -> None:
        self.generator = generator
        self.inbox = b""
        self.outcome: Agreed | BaseException | None = None
        self.action: int | bytes | None = None
        self._resume(lambda: next(generator))

    def run(self) -> bytes:
        """Go as far as the inbox lasts; what is to be sent."""
        sent = b""
        while self.outcome is None:
            if isinstance(self.action, bytes):
                sent += self.action
                self._resume(lambda: self.generator.send(b""))
            else:
                needed = self.action or 0
                if len(self.inbox) < needed:
                    break
                piece, self.inbox = self.inbox[:needed], self.inbox[needed:]
                self._resume(lambda piece=piece: self.generator.send(piece))  # type: ignore[misc]
        return sent

    def _resume(self, step: Callable[[], int | bytes]) -> None:
        try:
            self.action = step()
        except StopIteration as done:
            self.outcome = done.value
        except RingError as error:
            self.outcome = error


def converse(
    dialler: Side, listener: Side, tamper: Callable[[int, bytes], bytes] = lambda turn, data: data
) -> list[bytes]:
    """Both to their end; what passed each way, in turns. `tamper` may change what is on its way."""
    passed = []
    for turn in range(10):
        near, far = (dialler, listener) if turn % 2 == 0 else (listener, dialler)
        data = tamper(turn, near.run())
        if not data and turn > 1:
            break
        passed.append(data)
        far.inbox += data
    listener.run()
    return passed


def pair(
    ours: bytes | None, theirs: bytes | None, admit: Callable[[Hello], int] = accept, hello: Hello = HELLO
) -> tuple[Side, Side]:
    return Side(initiate(hello, ours, "rank 0 (a:1)")), Side(respond(Terms(theirs), "b:2", admit))


@pytest.mark.parametrize("secret", [None, b"secret"])
def test_both_agree_on_the_hello(secret: bytes | None) -> None:
    dialler, listener = pair(secret, secret)
    passed = converse(dialler, listener)
    assert dialler.outcome == listener.outcome == Agreed(HELLO, None)
    assert passed[0] == PREAMBLE + bytes([secret is not None])
    assert passed[1] == passed[0]
    assert (b"tiny:0123" in passed[2]) == (secret is None)
    if secret is None:
        assert passed[2][2:] == msgspec.msgpack.encode(["ring", 1, 0, 2, 0, "tiny:0123", -1, None, False])
        assert passed[3][2:] == msgspec.msgpack.encode([0, None, True, "off", None])
        assert passed[4] == b"\x05\x00ready"


@pytest.mark.parametrize(
    ("ours", "theirs", "dialler_says", "listener_says"),
    [
        (b"a", b"b", "rank 0 (a:1) holds another secret", "b:2 holds another secret"),
        (b"a", None, "this rank has a secret and rank 0 (a:1) has none", "b:2 has a secret and this rank has none"),
        (None, b"b", "rank 0 (a:1) has a secret and this rank has none", "this rank has a secret and b:2 has none"),
    ],
)
def test_unequal_secrets(ours: bytes | None, theirs: bytes | None, dialler_says: str, listener_says: str) -> None:
    dialler, listener = pair(ours, theirs)
    converse(dialler, listener)
    for side, words in ((dialler, dialler_says), (listener, listener_says)):
        assert isinstance(side.outcome, AuthenticationError)
        assert str(side.outcome).startswith(words)
        assert "give every rank the same" in str(side.outcome)


@pytest.mark.parametrize("secret", [None, b"secret"])
def test_the_dialler_hears_why_it_is_refused(secret: bytes | None) -> None:
    def refuse(hello: Hello) -> int:
        raise RefusedError(f"rank {hello.rank} is not wanted.", final=False)

    dialler, listener = pair(secret, secret, refuse)
    converse(dialler, listener)
    assert str(dialler.outcome) == "rank 0 (a:1) refused rank 1: rank 1 is not wanted."
    assert str(listener.outcome) == "rank 1 is not wanted."
    assert isinstance(dialler.outcome, RefusedError)
    assert not dialler.outcome.final


def test_the_dialler_reached_another_rank() -> None:
    dialler, listener = Side(initiate(HELLO, None, "rank 0 (a:1)")), Side(respond(Terms(), "b:2", lambda hello: 3))
    converse(dialler, listener)
    assert str(dialler.outcome) == "rank 0 (a:1) is rank 3, not rank 0; check the ports and the rank numbers."
    assert listener.outcome is None  # it waits for a confirmation that does not come


def test_another_protocol_number(monkeypatch: pytest.MonkeyPatch) -> None:
    dialler = Side(initiate(HELLO, None, "rank 0 (a:1)"))
    another = PROTOCOL + 1
    monkeypatch.setattr(handshake, "PROTOCOL", another)
    listener = Side(respond(Terms(), "b:2", accept))
    first = dialler.run()
    listener.inbox += first
    second = listener.run()
    assert str(listener.outcome).startswith(f"b:2 speaks protocol {PROTOCOL} and this rank protocol {another};")
    monkeypatch.setattr(handshake, "PROTOCOL", PROTOCOL)
    dialler.inbox += second
    dialler.run()
    assert str(dialler.outcome).startswith(f"rank 0 (a:1) speaks protocol {another} and this rank protocol {PROTOCOL};")


def test_a_replay_yields_no_link() -> None:
    recorded = converse(*pair(b"secret", b"secret"))
    admitted: list[Hello] = []

    def admit(hello: Hello) -> int:
        admitted.append(hello)
        return hello.to

    listener = Side(respond(Terms(b"secret"), "b:2", admit))
    for data in recorded[0::2]:
        listener.inbox += data
        listener.run()
    assert admitted == [HELLO]  # the hello alone can be replayed,
    assert isinstance(listener.outcome, AuthenticationError)  # but not the proof


def test_a_replayed_listener_yields_no_link() -> None:
    recorded = converse(*pair(b"secret", b"secret"))
    dialler = Side(initiate(HELLO, b"secret", "rank 0 (a:1)"))
    for data in recorded[1::2]:
        dialler.run()
        dialler.inbox += data
    dialler.run()
    assert isinstance(dialler.outcome, AuthenticationError)


def test_its_own_words_thrown_back_yield_no_link() -> None:
    dialler = Side(initiate(HELLO, b"secret", "rank 0 (a:1)"))
    for _ in range(4):
        said = dialler.run()
        dialler.inbox += said
    assert isinstance(dialler.outcome, AuthenticationError)


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=300), secret=SECRETS, preamble=st.booleans(), dials=st.booleans())
def test_garbage_meets_nothing_but_ring_errors(data: bytes, secret: bytes | None, preamble: bool, dials: bool) -> None:
    side = Side(initiate(HELLO, secret, "a") if dials else respond(Terms(secret), "b", accept))
    side.inbox = (PREAMBLE + bytes([secret is not None]) if preamble else b"") + data
    side.run()
    assert side.outcome is None or isinstance(side.outcome, ConnectError | AuthenticationError)


@settings(max_examples=200, deadline=None)
@given(frames=st.lists(st.binary(max_size=200), max_size=3), secret=SECRETS, dials=st.booleans())
def test_well_framed_garbage_too(frames: list[bytes], secret: bytes | None, dials: bool) -> None:
    side = Side(initiate(HELLO, secret, "a") if dials else respond(Terms(secret), "b", accept))
    framed = b"".join(len(frame).to_bytes(2, "little") + frame for frame in frames)
    side.inbox = PREAMBLE + bytes([secret is not None]) + framed
    side.run()
    assert side.outcome is None or isinstance(side.outcome, ConnectError | AuthenticationError)


@pytest.mark.parametrize("key", [bytes(32), b"\x01" + bytes(31), b"\xff" * 32])
def test_public_keys_of_low_order(key: bytes) -> None:
    for side in pair(b"secret", b"secret"):
        side.inbox = PREAMBLE + b"\x01" + (64).to_bytes(2, "little") + key + bytes(32)
        side.run()
        assert isinstance(side.outcome, AuthenticationError)


_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary()
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)
_NEARLY = st.tuples(*(_SCALARS for _ in range(6))).map(list)


@settings(max_examples=300, deadline=None)
@given(value=_VALUES | _NEARLY, dials=st.booleans())
def test_any_value_for_a_hello_or_a_welcome(value: object, dials: bool) -> None:
    payload = msgspec.msgpack.encode(value)[:MAX_MESSAGE]
    side = Side(initiate(HELLO, None, "a") if dials else respond(Terms(), "b", accept))
    side.inbox = PREAMBLE + b"\x00" + len(payload).to_bytes(2, "little") + payload + b"\x05\x00ready"
    side.run()
    assert isinstance(side.outcome, ConnectError | Agreed) or payload == b""


@settings(max_examples=150, deadline=None)
@given(turn=st.integers(0, 4), position=st.integers(0, 300), flip=st.integers(1, 255))
def test_a_flipped_bit_is_noticed_by_those_who_share_a_secret(turn: int, position: int, flip: int) -> None:
    changed = False

    def tamper(now: int, data: bytes) -> bytes:
        nonlocal changed
        if now != turn or position >= len(data):
            return data
        changed = True
        return data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :]

    dialler, listener = pair(b"secret", b"secret")
    converse(dialler, listener, tamper)
    if changed:
        assert not isinstance(listener.outcome, Agreed)
    for side in (dialler, listener):
        assert side.outcome is None or isinstance(side.outcome, Agreed | ConnectError | AuthenticationError)


@pytest.mark.parametrize("dials", [False, True])
def test_a_long_message_is_refused_by_its_announcement(dials: bool) -> None:
    side = Side(initiate(HELLO, None, "a") if dials else respond(Terms(), "b", accept))
    side.inbox = PREAMBLE + b"\x00" + (MAX_MESSAGE + 1).to_bytes(2, "little")
    side.run()
    assert "announced a handshake message of 2049 bytes; 2048 are allowed" in str(side.outcome)


def test_a_long_reason_is_cut_to_what_a_dialler_reads() -> None:
    def refuse(hello: Hello) -> int:
        raise RefusedError("é" * 3000)

    dialler, listener = pair(b"secret", b"secret", refuse)
    converse(dialler, listener)
    assert isinstance(dialler.outcome, RefusedError)
    assert str(dialler.outcome).endswith("é" * 409)
