"""Where ranks meet whose ring is not there yet, or no more: rank 0 takes them in and tells each its place in the next.

Whoever joins keeps a link to rank 0's listening port open until it is given a rank; those beyond the world size wait as
spares. What it does not know: how a ring forms, models, requests.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec

from ringlm.cluster.joining import (
    BEAT_S,
    SILENCE_S,
    Assignment,
    Beat,
    End,
    Gauge,
    Gauged,
    Member,
    Offer,
    words,
)
from ringlm.errors import ConfigError, ConnectError, RingLMError
from ringlm.ring.handshake import Hello, Place, RefusedError, check_model
from ringlm.ring.listener import Listener
from ringlm.ring.same_machine import own_host
from ringlm.ring.seal import Connection

MAX_GUESTS = 256

log = logging.getLogger("ringlm")


class Gathered(NamedTuple):
    """Who makes up the next ring besides rank 0, by whose share of the model each takes, and its epoch."""

    seats: dict[int, Member]
    epoch: int


class _Guest:
    """A link by which somebody joins. `member` is what it has said of itself, once it has."""

    def __init__(self, link: Connection) -> None:
        self.sock = link.sock
        self.stream = words(link)
        self.member: Member | None = None
        self.gauged: Gauged | None = None  # its answer, once it has been asked
        self.heard = time.monotonic()
        self.seated = False  # it has its answer, and leaves


class Rendezvous:
    """Rank 0's lobby on `listener`, from the first ring to the last. `offer` is what everybody is told first; `judge`
    raises ConfigError for a member that cannot be one. `returned` is set once somebody has come who had a rank, and
    `on_return` called then."""

    def __init__(
        self,
        listener: Listener,
        fingerprint: str,
        offer: Offer,
        judge: Callable[[Member], None],
        on_return: Callable[[], None],
    ) -> None:
        self.returned = threading.Event()
        self._listener = listener
        self._fingerprint = fingerprint
        self._offer = offer
        self._judge = judge
        self._on_return = on_return
        self._arrived: list[_Guest] = []  # whom the thread does not know yet
        self._guests: list[_Guest] = []
        self._changed = threading.Condition()
        self._ended: RingLMError | None = None
        self._complete = True
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ringlm-rendezvous", daemon=True)
        self._thread.start()
        listener.lobby = self

    # -- for rank 0 ----------------------------------------------------------------------------

    def place(self, place: Place) -> Place:
        """`place` with every host at which somebody here has reached this rank, the likeliest first."""
        with self._changed:
            hosts = [own_host(guest.sock) for guest in self._guests]
        return Place(list(dict.fromkeys([*place.hosts, *hosts])), place.port, place.network)

    def waiting(self) -> list[Member]:
        """Those who have said what they are, and have no seat."""
        with self._changed:
            return [guest.member for guest in self._guests if guest.member is not None and not guest.seated]

    def gather(
        self, choose: Callable[[list[Member], float], dict[int, Member] | None], epoch: int, timeout_s: float
    ) -> Gathered:
        """Wait until `choose` finds the seats of the next ring among those present, `timeout_s` at most; it is asked
        again whenever somebody comes or goes and is told how long it has been, and the last time after the timeout.
        The epoch is above `epoch`, and above that of everybody here. Raises what `choose` does, and ConnectError."""
        began = time.monotonic()
        with self._changed:
            self._complete = False
            while True:
                if self._ended is not None:
                    raise self._ended
                waited_s = time.monotonic() - began
                present = self.waiting()
                seats = choose(present, min(waited_s, timeout_s))
                if seats is not None:
                    self._complete = len(seats) >= self._offer.world_size - 1
                    return Gathered(seats, max([epoch, *(member.epoch for member in present)]) + 1)
                if waited_s >= timeout_s:
                    raise ConnectError(f"{len(present)} joined within {timeout_s:g} s, which are too few.")
                self._changed.wait(min(0.25, timeout_s - waited_s))

    def ask(self, questions: Sequence[tuple[Member, Gauge]]) -> None:
        """Have members measure links, all at once."""
        with self._changed:
            for guest in self._guests:
                for member, word in questions:
                    if guest.member is member:
                        guest.gauged = None
                        _say(guest, word)  # one that has just left answers nothing

    def answers(self, members: Sequence[Member], timeout_s: float) -> list[Gauged]:
        """What they have to say, those who have been asked; whoever has left or is too slow gives a reason only."""
        stop = time.monotonic() + timeout_s
        with self._changed:
            while True:
                here = {id(guest.member): guest for guest in self._guests}
                asked = [here.get(id(member)) for member in members]
                missing = [guest for guest in asked if guest is not None and guest.gauged is None]
                if not missing or not self._changed.wait(max(0.0, stop - time.monotonic())):
                    silent = Gauged(None, "who was to measure it did not answer.")
                    return [silent if guest is None else guest.gauged or silent for guest in asked]

    def answer(self, member: Member, word: Assignment | End) -> None:
        """Give somebody who waits a rank, or the reason why there is none."""
        with self._changed:
            for guest in self._guests:
                if guest.member is member:
                    guest.seated = True
                    _say(guest, word)  # one that has just left is missed when the ring forms

    def close(self, why: str) -> None:
        """Take nobody in any more, and tell who waits that it is over. Idempotent."""
        with self._changed:
            if self._ended is not None:
                return
            self._ended = ConnectError(why)
            self._listener.lobby = None
            for guest in self._guests:
                if not guest.seated:
                    _say(guest, End(why))
            self._changed.notify_all()
        self._wake.send(b"x")
        self._thread.join(5.0)
        for guest in (*self._arrived, *self._guests):
            guest.sock.close()
        self._wake.close()
        self._woken.close()

    # -- for the listener ----------------------------------------------------------------------

    def admit(self, hello: Hello) -> int:
        """Rank 0. Raises RefusedError for who has another model, and where too many wait."""
        if len(self._guests) + len(self._arrived) >= MAX_GUESTS:
            raise RefusedError(f"{MAX_GUESTS} wait here already.", final=False)
        check_model(hello.fingerprint, self._fingerprint, "this rank", "the ring")
        return 0

    def receive(self, hello: Hello, link: Connection) -> None:
        link.sock.setblocking(False)
        guest = _Guest(link)
        with self._changed:
            if self._ended is not None:
                guest.sock.close()
                return
            _say(guest, msgspec.structs.replace(self._offer, complete=self._complete))
            self._arrived.append(guest)
            self._wake.send(b"x")
        if hello.rank >= 0 and not self.returned.is_set():
            self.returned.set()
            self._on_return()

    # -- the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._attend(selector)
        except BaseException as error:
            with self._changed:  # who gathers is not to wait for ever
                self._ended = RingLMError(f"the rendezvous met {type(error).__name__}: {error}")
                self._changed.notify_all()
            raise

    def _attend(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._woken, selectors.EVENT_READ)
        due = time.monotonic()
        while self._ended is None:
            for key, _ in selector.select(max(0.0, due - time.monotonic())):
                if key.data is None:
                    self._woken.recv(64)
                    self._let_in(selector)
                elif not self._take(key.data):
                    self._drop(selector, key.data)
            if time.monotonic() >= due:
                due = time.monotonic() + BEAT_S
                for guest in [key.data for key in selector.get_map().values() if key.data is not None]:
                    if time.monotonic() - guest.heard > SILENCE_S or not _say(guest, Beat()):
                        self._drop(selector, guest)

    def _let_in(self, selector: selectors.BaseSelector) -> None:
        with self._changed:
            arrived, self._arrived = self._arrived, []
            self._guests += arrived
        for guest in arrived:
            selector.register(guest.sock, selectors.EVENT_READ, guest)

    def _take(self, guest: _Guest) -> bool:
        """What a guest has sent; False when it has left, or is none."""
        try:
            said = guest.stream.receive()
        except (OSError, ValueError) as error:
            if guest.member is not None and not guest.seated:  # else somebody who only asked
                log.info("a rank that waited has left: %s", error)
            return False
        guest.heard = time.monotonic()
        for word in said:
            if isinstance(word, Member):
                try:
                    self._judge(word)
                except ConfigError as error:
                    log.warning("turned away a rank that would join: %s", error)
                    _say(guest, End(str(error), mistake=True))
                    return False
                with self._changed:
                    guest.member = word
                    self._changed.notify_all()
            elif isinstance(word, Gauged):
                with self._changed:
                    guest.gauged = word
                    self._changed.notify_all()
        return True

    def _drop(self, selector: selectors.BaseSelector, guest: _Guest) -> None:
        selector.unregister(guest.sock)
        with self._changed:
            self._guests.remove(guest)
            self._changed.notify_all()
        guest.sock.close()


def _say(guest: _Guest, word: msgspec.Struct) -> bool:
    """Whether it could be sent; a guest reads, or is dropped."""
    try:
        guest.sock.sendall(guest.stream.frame(word))
    except OSError:
        return False
    return True
