"""How a link opens: preamble, hello, welcome, confirmation. Pure protocol; the caller moves the bytes.

    dialler                                    listener
    "ringlm" protocol flags             ->
                                        <-     "ringlm" protocol flags
    length, hello                       ->
                                        <-     length, welcome (or the reason of a refusal)
    length, confirmation                ->

With a secret the three messages are those of Noise_NNpsk0_25519_AESGCM_SHA256 (the Noise Protocol
Framework, revision 34) with both preambles as the prologue: mutual, fresh, and bound to what the hello
says. The confirmation, the first message under the handshake's keys, proves that the hello was not a
replay, so the listener hands out no link before it. The keys then go on to seal what follows (`seal`), as the
two have agreed in hello and welcome. Both sides are generators that yield either the
number of bytes they need or the bytes to send: one body serves blocking and event-driven callers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from typing import Annotated, Any, NamedTuple

import msgspec

from ringlm.errors import AuthenticationError, ConnectError
from ringlm.ring.address import Address, is_loopback
from ringlm.ring.seal import Keys, Mode, Seal

PROTOCOL = 7
MAGIC = b"ringlm"
MAX_MESSAGE = 2048
_SECRET_FLAG = 1
_CONFIRMATION = b"ready"

Handshake = Generator[int | bytes, bytes, Any]  # returns what was Agreed


class Hello(msgspec.Struct, frozen=True, array_like=True):
    """What a dialler says of itself. `purpose` is ring, mesh, control, relay, join or gauge; `to` is the rank it wants,
    and `beyond`, of a relay, the one to which that is to lead. Who joins is of no rank yet, -1, or tells its last one.
    `seal` is what it was told of sealing, if anything, and `far`: the link leaves this machine, as far as the dialler
    can see."""

    purpose: str
    rank: int
    to: int
    world_size: int
    epoch: int
    fingerprint: str
    beyond: int = -1
    seal: Mode | None = None
    far: bool = False


def differing(one: str, other: str) -> list[str]:
    """The fields in which two fingerprints, "label:field=value,field=value", differ; their labels may."""
    first, second = (
        dict(field.partition("=")[::2] for field in text.rpartition(":")[2].split(",")) for text in (one, other)
    )
    return [field for field in first | second if first.get(field) != second.get(field)]


def check_model(theirs: str, ours: str, who: str, here: str) -> None:
    """Raises RefusedError where the fingerprints of `who` dials and of what is `here` differ."""
    if theirs and ours and (fields := differing(theirs, ours)):
        models = [text.rpartition(":")[0] for text in (theirs, ours)]
        raise RefusedError(
            f"{who} has the model {models[0]} and {here} {models[1]}, whose {' and '.join(fields)} differ; every rank "
            "needs the same model, under any name: copy its files, or mend -m or --adapter."
        )


class Place(msgspec.Struct, frozen=True, array_like=True):
    """Where a rank listens: at `port` of any of `hosts`. Loopback's only from the same `network`."""

    hosts: list[str]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    network: str

    def addresses(self, network: str) -> list[Address]:
        """Those that mean this rank when they are dialled from `network`."""
        return [Address(host, self.port) for host in self.hosts if network == self.network or not is_loopback(host)]


class Welcome(msgspec.Struct, frozen=True, array_like=True):
    """The listener's answer: refused is None, or why; a `final` refusal is not worth another try. `seal`: how what
    follows is sealed. `join`, of a ring that runs, is where its rank 0 takes in whoever was refused."""

    rank: int
    refused: str | None = None
    final: bool = True
    seal: Mode = "off"
    join: Place | None = None


class Terms(NamedTuple):
    """What a rank asks of every link: a secret, and how it is to be sealed, if it was told so."""

    secret: bytes | None = None
    seal: Mode | None = None


class Agreed(NamedTuple):
    """What both ends of a link know once it is open."""

    hello: Hello
    seal: Seal | None


class RefusedError(ConnectError):
    """This link was refused, by us or by the peer. `final`: another try would end the same way; but who may `join`
    does so there."""

    def __init__(self, message: str, final: bool = True, join: Place | None = None) -> None:
        super().__init__(message)
        self.final = final
        self.join = join


class _Plain:
    def write(self, payload: bytes) -> bytes:
        return payload

    def read(self, message: bytes) -> bytes:
        return message

    def seal(self, mode: Mode) -> Seal | None:
        return None


class _Noise:
    """The three messages of one side of an NNpsk0 handshake."""

    def __init__(self, secret: bytes, prologue: bytes, initiator: bool, peer: str) -> None:
        from noise.connection import NoiseConnection

        self._peer = peer
        self._noise: Any = NoiseConnection.from_name(b"Noise_NNpsk0_25519_AESGCM_SHA256")
        self._noise.set_psks(hashlib.sha256(b"ringlm pre-shared key\0" + secret).digest())
        self._noise.set_prologue(prologue)
        (self._noise.set_as_initiator if initiator else self._noise.set_as_responder)()
        self._noise.start_handshake()

    def write(self, payload: bytes) -> bytes:
        noise = self._noise
        return bytes(noise.encrypt(payload) if noise.handshake_finished else noise.write_message(payload))

    def read(self, message: bytes) -> bytes:
        from cryptography.exceptions import InvalidTag
        from noise.exceptions import NoiseInvalidMessage, NoiseValueError

        noise = self._noise
        try:
            return bytes(noise.decrypt(message) if noise.handshake_finished else noise.read_message(message))
        except (InvalidTag, NoiseInvalidMessage, NoiseValueError, ValueError):
            # The latter two: too few bytes for a public key, or one of low order
            raise AuthenticationError(
                f"{self._peer} holds another secret; give every rank the same RING_SECRET or --secret-file."
            ) from None

    def seal(self, mode: Mode) -> Seal | None:
        """What seals the link from here on."""
        if mode == "off":
            return None
        send, receive = self._noise.noise_protocol.cipher_state_encrypt, self._noise.noise_protocol.cipher_state_decrypt
        return Seal(Keys(send.k, receive.k, send.n, receive.n), mode == "on")


def initiate(hello: Hello, secret: bytes | None, peer: str) -> Handshake:
    """The dialler's side; `peer` names the other in errors. Returns what was Agreed.

    Raises RefusedError with the listener's reason, AuthenticationError, or ConnectError.
    """
    ours = _preamble(secret)
    yield ours
    theirs = yield len(ours)
    _check_preamble(theirs, secret, peer)
    cipher = _Plain() if secret is None else _Noise(secret, ours + theirs, True, peer)
    yield _frame(cipher.write(msgspec.msgpack.encode(hello)))
    answer = yield from _message(peer)
    if not answer:
        raise AuthenticationError(
            f"{peer} holds another secret; give every rank the same RING_SECRET or --secret-file."
        )
    welcome = _parse(Welcome, cipher.read(answer), peer)
    if welcome.refused is not None:
        who = f"rank {hello.rank}" if hello.rank >= 0 else "this rank"
        raise RefusedError(f"{peer} refused {who}: {welcome.refused}", welcome.final, welcome.join)
    if welcome.rank != hello.to:
        raise RefusedError(f"{peer} is rank {welcome.rank}, not rank {hello.to}; check the ports and the rank numbers.")
    if hello.seal not in (None, welcome.seal) and hello.purpose != "relay":
        raise RefusedError(f"{peer} answers --seal {hello.seal} with {welcome.seal}.")
    yield _frame(cipher.write(_CONFIRMATION))
    return Agreed(hello, cipher.seal(welcome.seal))


def respond(terms: Terms, peer: str, admit: Callable[[Hello], int], far: bool = False) -> Handshake:
    """The listener's side. `admit` returns the rank that was reached, or raises RefusedError for a hello that is not
    wanted; the dialler is told.
    `far`: the link comes from another machine, as far as the listener can see.

    Raises RefusedError, AuthenticationError or ConnectError; returns what was Agreed.
    """
    secret = terms.secret
    ours = _preamble(secret)
    theirs = yield len(ours)
    if theirs[: len(MAGIC)] != MAGIC:
        raise ConnectError(f"{peer} does not speak ringlm's protocol.")
    yield ours  # before the check, so that a dialler of another version can name both
    _check_preamble(theirs, secret, peer)
    message = yield from _message(peer)
    cipher = _Plain() if secret is None else _Noise(secret, theirs + ours, False, peer)
    try:
        payload = cipher.read(message)
    except AuthenticationError:
        yield _frame(b"")  # so that the dialler knows too
        raise
    hello: Hello = _parse(Hello, payload, peer)
    try:
        rank = admit(hello)
        mode = _sealing(hello, rank, terms, far)
    except RefusedError as refusal:
        reason = str(refusal)[: MAX_MESSAGE // 5]  # at most four bytes a character
        welcome = Welcome(hello.to, reason, refusal.final, join=refusal.join)
        yield _frame(cipher.write(msgspec.msgpack.encode(welcome)))
        raise
    yield _frame(cipher.write(msgspec.msgpack.encode(Welcome(rank, seal=mode))))
    confirmation = yield from _message(peer)
    if cipher.read(confirmation) != _CONFIRMATION:
        raise ConnectError(f"{peer} did not confirm its hello.")
    return Agreed(hello, cipher.seal(mode))


def _sealing(hello: Hello, rank: int, terms: Terms, far: bool) -> Mode:
    """How a link is sealed: as either end was told, else if it leaves the machine. What comes through a relay, and does
    leave it, is sealed by its ends; what a gauge sends means nothing. Raises RefusedError where they were told
    differently."""
    if terms.secret is None or hello.purpose in ("relay", "gauge"):
        return "off"
    if hello.seal and terms.seal and hello.seal != terms.seal:
        raise RefusedError(
            f"rank {hello.rank} was started with --seal {hello.seal} and rank {rank} with --seal {terms.seal}; "
            "give every rank the same, or leave it out."
        )
    return hello.seal or terms.seal or ("on" if far or hello.far else "off")


def _preamble(secret: bytes | None) -> bytes:
    return MAGIC + bytes((PROTOCOL, _SECRET_FLAG if secret is not None else 0))


def _check_preamble(theirs: bytes, secret: bytes | None, peer: str) -> None:
    if theirs[: len(MAGIC)] != MAGIC:
        raise ConnectError(f"{peer} does not speak ringlm's protocol; another program listens there.")
    if theirs[6] != PROTOCOL:
        raise RefusedError(
            f"{peer} speaks protocol {theirs[6]} and this rank protocol {PROTOCOL}; install the same ringlm on both."
        )
    if bool(theirs[7] & _SECRET_FLAG) != (secret is not None):
        has, lacks = (peer, "this rank") if secret is None else ("this rank", peer)
        raise AuthenticationError(f"{has} has a secret and {lacks} has none; give every rank the same one.")


def _frame(message: bytes) -> bytes:
    return len(message).to_bytes(2, "little") + message


def _message(peer: str) -> Generator[int | bytes, bytes, bytes]:
    length = int.from_bytes((yield 2), "little")
    if length > MAX_MESSAGE:
        raise ConnectError(f"{peer} announced a handshake message of {length} bytes; {MAX_MESSAGE} are allowed.")
    return (yield length) if length else b""


def _parse(kind: type[Any], payload: bytes, peer: str) -> Any:
    try:
        return msgspec.msgpack.decode(payload, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConnectError(f"{peer} sent a malformed {kind.__name__.lower()}: {error}.") from None
