"""The control plane: links in a star to rank 0 that say who is alive and why the ring ended.

One thread a rank, asleep in select. A heartbeat carries a step counter, since a heartbeat alone stays
green while the engine is stuck. The first failure that any rank sees reaches all of them through rank
0, and with it the data links are shut, which wakes whoever waits on them.
"""

from __future__ import annotations

import dataclasses
import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable, Collection, Mapping

from ringlm.errors import CollectiveTimeoutError, DesyncError, PeerError, PeerLostError
from ringlm.ring import wire
from ringlm.ring.pace import Paces
from ringlm.ring.peer import MAX_CONTROL_BYTES, MAX_TRAFFIC, Abort, Beat, Bye, Peer
from ringlm.ring.seal import Connection

_GRACE_S = 2.0

_KINDS: dict[str, type[PeerError]] = {
    kind.__name__: kind for kind in (PeerLostError, CollectiveTimeoutError, DesyncError)
}

log = logging.getLogger("ringlm.ring")


@dataclasses.dataclass(frozen=True)
class Heartbeat:
    """How liveness is judged. `progress` returns the counter and whether this rank is computing;
    `alive` may hold the beat back (the frontend of this rank has stopped); `computed_s` adds up what steps took outside
    of collectives. A peer is lost when it is
    silent for `silence_s`, or when it computes and its counter stands still for `stall_s`."""

    progress: Callable[[], tuple[int, bool]] = lambda: (0, False)
    alive: Callable[[], bool] = lambda: True
    computed_s: Callable[[], float] = lambda: 0.0
    interval_s: float = 1.0
    silence_s: float = 5.0
    stall_s: float = 60.0


class ControlPlane:
    """This rank's side of the star, asleep until `start`. Peers, which may still be forming the ring, have
    `patience_s` longer for their first beat. What becomes of `relayed` ones may be the fault of a rank on
    the way, so who is nearer to it has a moment to say so."""

    def __init__(
        self,
        rank: int,
        links: Mapping[int, Connection],
        names: list[str],
        heartbeat: Heartbeat,
        patience_s: float = 0.0,
        relayed: Collection[int] = (),
    ) -> None:
        self.rank = rank
        self.failure: PeerError | None = None
        self.slow: dict[int, float] = {}  # on rank 0: who computes how many times as long as the others
        self._paces = Paces()
        self._names = names
        self._heartbeat = heartbeat
        now = time.monotonic()
        self._peers = {
            peer: Peer(link, peer, names[peer], now + patience_s, peer in relayed) for peer, link in links.items()
        }
        self._calls: tuple[bytes, ...] = ()
        self._calls_since = now
        self._lock = threading.RLock()  # what `on_failure` does may come back here
        self._failed = threading.Event()
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="ringlm-control", daemon=True)

    def start(
        self,
        call: Callable[[], bytes],
        on_failure: Callable[[PeerError], None],
        traffic: Callable[[], list[tuple[int, int, int]]] = list,
    ) -> None:
        """Begin. `call` returns the call that is under way, or nothing; `on_failure` must shut
        the data links, and runs on any thread; `traffic` is what beats say of them."""
        self._call = call
        self._traffic = traffic
        self._on_failure = on_failure
        self._thread.start()

    def fail(self, error: PeerError, reporter: int | None = None) -> PeerError:
        """End the ring on every rank because of `error`, unless it has ended; the error it ended with."""
        with self._lock:
            if self.failure is None and not self._closed:
                self.failure = error
                text = str(error)[: MAX_CONTROL_BYTES // 8]  # at most four bytes a character
                message = Abort(error.rank, type(error).__name__, text, self.rank if reporter is None else reporter)
                for peer in self._peers.values():
                    peer.send(message)
                self._on_failure(error)
                self._failed.set()
            return self.failure or error

    def round_trip_s(self, rank: int) -> float | None:
        """Of the last beat to `rank` and back, for which both have one; None if there was none yet, or no link."""
        peer = self._peers.get(rank)
        return None if peer is None else peer.round_trip_s

    def traffic(self) -> dict[int, list[tuple[int, int, int]]]:
        """By rank, what its last beat said of its links to ranks above it."""
        return {rank: peer.traffic for rank, peer in sorted(self._peers.items())}

    def settle(self, error: PeerError, wait_s: float = 1.0) -> PeerError:
        """End the ring because of `error`, or because of what lies behind it. A link also closes, and a peer
        is also late, when a third rank was lost first; who knows of that is given `wait_s` to say so."""
        certain = isinstance(error, DesyncError) or (isinstance(error, CollectiveTimeoutError) and self.rank == 0)
        peer = self._peers.get(error.rank)
        stop = time.monotonic() + (0.0 if certain else wait_s)
        while time.monotonic() < stop and not self._failed.wait(0.02):
            if peer is not None and peer.left:
                error = PeerLostError(f"{peer.name} is lost: it has left the ring in order.", peer.rank)
                break
        return self.fail(error)

    def close(self) -> None:
        """Leave in order. Idempotent."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            if self.failure is None:
                for peer in self._peers.values():
                    peer.send(Bye())
        self._wake.send(b"x")
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(5.0)
        for peer in self._peers.values():
            peer.close()
        self._wake.close()
        self._woken.close()

    def _run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._watch(selector)
        except BaseException as error:
            reason = f"its control thread met {type(error).__name__}: {error}"
            self.fail(PeerLostError(f"rank {self.rank} failed: {reason}", self.rank))
            raise

    def _watch(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._woken, selectors.EVENT_READ)
        for peer in self._peers.values():
            selector.register(peer.sock, selectors.EVENT_READ, peer)
        due = time.monotonic()
        while not self._closed:
            now = time.monotonic()
            if now >= due and self.failure is None:
                self._beat()
                # A rank that was stopped itself has heard nobody meanwhile, and must not judge.
                if now - due < self._heartbeat.silence_s / 2:
                    self._judge(now)
            if now >= due:
                due = now + self._heartbeat.interval_s
            for key, _ in selector.select(due - now):
                if key.data is not None and not self._receive(key.data):
                    selector.unregister(key.fileobj)

    def _beat(self) -> None:
        if self._heartbeat.alive():
            progress, busy = self._heartbeat.progress()
            computed_s, call, clock = self._heartbeat.computed_s(), self._call(), time.monotonic()
            traffic = self._traffic()[:MAX_TRAFFIC] if self.rank else []
            self._observe(self.rank, clock, progress, computed_s)
            with self._lock:
                for peer in self._peers.values():
                    echo = None if peer.offset is None else clock + peer.offset
                    peer.send(Beat(progress, busy, call, clock, echo, computed_s, traffic))

    def _observe(self, rank: int, at_s: float, progress: int, computed_s: float) -> None:
        """Rank 0 notices which rank all others wait for, and says so when that changes."""
        if self.rank != 0:
            return
        self._paces.observe(rank, at_s, progress, computed_s)
        before, self.slow = self.slow, self._paces.slow()
        for slow in self.slow.keys() - before.keys():
            log.warning(
                "%s is slow: it computes %.1f times as long as the others, which wait for it; give it less by --split, "
                "or end what else runs there.", self._names[slow], self.slow[slow],
            )  # fmt: skip

    def _judge(self, now: float) -> None:
        """Fail because of the first peer that is silent or stuck, or because all wait for each other."""
        silence_s, stall_s = self._heartbeat.silence_s, self._heartbeat.stall_s
        for peer in self._peers.values():
            if peer.left:
                continue
            grace_s = _GRACE_S if peer.relayed else 0.0
            if now - peer.ended > grace_s:
                what = "is lost: it ended, or its link was cut."
            elif now - peer.heard > silence_s + grace_s:
                what = f"is lost: silent for {silence_s:g} s; it is stopped, or cut off."
            elif now - peer.moved > stall_s:
                what = f"is stuck: it answers, but its step has not moved for {stall_s:g} s."
            else:
                continue
            self.fail(PeerLostError(f"{peer.name} {what}", peer.rank))
            return
        mine, theirs = self._call(), [peer.call for peer in self._peers.values()]
        if (mine, *theirs) != self._calls:
            self._calls, self._calls_since = (mine, *theirs), now
        if self.rank != 0 or now - self._calls_since < stall_s or not all(self._calls):
            return
        for peer in self._peers.values():
            # Sizes may differ where ranks send their own; the rest may not.
            if wire.contradict(mine, peer.call):
                self.fail(DesyncError(wire.mismatch(0, mine, peer.name, peer.call), peer.rank))

    def _receive(self, peer: Peer) -> bool:
        """Take what a peer sent; False when its link has ended."""
        try:
            messages = peer.receive()
        except ValueError as error:
            self.fail(PeerLostError(f"{peer.name} is lost: its control link {error}.", peer.rank))
            return False
        except OSError:
            peer.ended = time.monotonic()
            if not peer.left and not peer.relayed:
                self.fail(PeerLostError(f"{peer.name} is lost: it ended, or its link was cut.", peer.rank))
            return False
        for message in messages:
            if isinstance(message, Beat):
                self._observe(peer.rank, peer.heard, message.progress, message.computed)
            elif isinstance(message, Abort):
                kind, rank = _KINDS.get(message.kind, PeerLostError), message.rank
                if kind is DesyncError and rank == self.rank:
                    rank = message.reporter  # each side of a mismatch names the other
                if not 0 <= rank < len(self._names):
                    rank = peer.rank
                self.fail(kind(message.text, rank), message.reporter)
        return True
