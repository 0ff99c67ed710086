"""The engine process of one rank: connect, agree, load, then lead (rank 0) or follow; and again when a rank is lost.

    python -m ringlm.cluster.worker --spec FD [--channel FD]

It ends when its frontend or launcher does, when rank 0 says so (status 0), or when a rank is lost for good
(status 1, which names it). Messages to a person go to stderr, one line each.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from ringlm import logs
from ringlm.cluster import spec
from ringlm.cluster.agreement import Refused
from ringlm.cluster.channel import ChannelClosed
from ringlm.cluster.leading import Leader
from ringlm.cluster.leaving import leave_when_idle
from ringlm.cluster.loading import Loaded, Loader
from ringlm.cluster.messages import Failed, Progress, Recovering
from ringlm.cluster.parent import watch_parent
from ringlm.cluster.seating import Seating
from ringlm.cluster.spec import EngineSpec
from ringlm.cluster.upstream import Frontend
from ringlm.engine.follower import follow
from ringlm.errors import ConnectError, PeerError, RingLMError
from ringlm.parallel.communicator import Communicator
from ringlm.ring import Heartbeat, Ring
from ringlm.ring.calls import last_words

RECOVERIES = 3  # without progress between them: a token, or a ring that has held
HELD_S = 60.0

log = logging.getLogger("ringlm")


class Worker:
    """One rank, from start to end, through as many rings as it takes."""

    def __init__(self, engine: EngineSpec, frontend: Frontend | None) -> None:
        self.spec = engine
        self.frontend = frontend
        self.leader: Leader | None = None
        self.ring: Ring | None = None
        self.comm: Communicator | None = None  # the ring, or what it was asked to leave its work to
        self._computed_s: Callable[[], float] = lambda: 0.0
        self._following = False  # whether `ring.sequence` should grow when no collective is under way
        self._unneeded: str | None = None  # why nobody wants this process any more
        self._recoveries = self._vain = 0  # all, and those since there was progress
        self._generated, self._since = 0, 0.0  # tokens at the last recovery, and when its ring was ready

    def run(self) -> None:
        """Raises the RingLMError that ended the last ring; returns when it ended in order."""
        if self.frontend is not None and self.spec.leads:
            self.leader = Leader(self.frontend)
            self.leader.tell(Progress("connect"))
        elif self.frontend is not None:  # a daemon of the same parent has one to learn of the parent's end
            self.frontend.on_end = lambda: self._end("its parent process ended")
        watch_parent(lambda: self._end("its launcher ended"))
        try:
            with Seating(Loader(self.spec), lambda stage: self._show(Progress(stage))) as seating:
                self._go_round(seating)
        except SystemExit:
            if self.leader is None or not self.leader.dismissed:
                raise

    def _go_round(self, seating: Seating) -> None:
        """Ring after ring: form it, load, work, until one ends in order or cannot be followed by another."""
        with self._paused():
            self.ring = seating.first(self._heartbeat())
        while True:
            lost, again = None, False
            try:
                again = self._take_part(seating)
                if not again and self.spec.join is None:
                    return
            except PeerError as error:
                lost = type(error)(str(error), error.rank)  # without the frames that hold what was loaded
            except BaseException as error:
                self._part(error)
                raise
            finally:
                self._leave()
            self._recover(seating, lost, "the ring takes more ranks in" if again else "rank 0 has ended")

    def _take_part(self, seating: Seating) -> bool:
        """Whether the ring has ended to be formed again."""
        with self._paused():
            loaded = self._load(seating)
        return self._work(loaded, seating)

    def _load(self, seating: Seating) -> Loaded:
        loaded = seating.loader.load(
            self.ring, seating.settings, seating.epoch, lambda done, total: self._show(Progress("load", done, total))
        )
        if self.ring is not None:
            timeout_s = loaded.rejoin_timeout_s
            if timeout_s and (self.ring.topology == "chain" or loaded.comm is not self.ring):
                timeout_s = 0.0
                if self.leader is not None:
                    log.warning(
                        "a lost rank will end this ring: it can be formed again only by --backend ring, and "
                        "where all ranks reach rank 0 without others between."
                    )
            seating.formed(self.ring, timeout_s)
        return loaded

    def _work(self, loaded: Loaded, seating: Seating) -> bool:
        self.comm, self._since = loaded.comm, time.monotonic()
        self._computed_s = lambda: loaded.runner.computed_s
        ready = msgspec.structs.replace(
            loaded.ready,
            recoveries=self._recoveries,
            full_world_size=self.spec.world_size,
            measured=seating.measured,
        )
        if self.leader is not None:
            return self.leader.lead(loaded._replace(ready=ready), self.ring, seating.spares, seating.grows)
        self._following = True  # a daemon that is not within a collective computes
        return follow(loaded.runner, loaded.comm, epoch=ready.epoch)

    def _recover(self, seating: Seating, lost: PeerError | None, why: str) -> None:
        """Form the ring again after `lost` has ended it, or rank 0 in order, and `why`. Raises it where that is no
        use."""
        dismissed = self._unneeded is not None or (self.leader is not None and self.leader.dismissed)
        if lost is not None and (dismissed or (not seating.rejoin_timeout_s and self.spec.join is None)):
            raise lost
        if self.leader is not None and lost is not None:
            held = self.leader.generated > self._generated or time.monotonic() - self._since > HELD_S
            self._vain = 1 if held else self._vain + 1
            if self._vain > RECOVERIES:
                raise lost
            self._generated = self.leader.generated
        if lost is not None:
            why = str(lost).rstrip(".")
        if self.leader is not None:
            self._recoveries += 1
            self.leader.tell(Recovering(None if lost is None else lost.rank, f"{why}."))
        log.warning("%s. Waiting for the ring to be formed again.", why)
        try:
            with self._paused():
                self.ring = seating.next(lost)
        except ConnectError as error:
            if lost is None:
                raise
            raise type(lost)(f"{why}. The ring was not formed again: {error}", lost.rank) from error

    def _paused(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.leader is None else self.leader.waiting()

    def _part(self, error: BaseException) -> None:
        """Let the others know that this rank ends."""
        if self.leader is not None and self.leader.dismissed:
            self.leader.farewell()
        elif self.ring is not None and not isinstance(error, Refused):
            self.ring.abort(last_words(error))

    def _leave(self) -> None:
        self._following, self._computed_s = False, lambda: 0.0
        ring, self.ring, self.comm = self.ring, None, None
        if ring is not None:
            ring.close()

    def _heartbeat(self) -> Heartbeat:
        # Only rank 0's frontend speaks; a daemon learns of its parent's end from the channel's.
        if self.leader is not None and self.frontend is not None:
            return Heartbeat(self._progress, self.frontend.alive, lambda: self._computed_s())
        return Heartbeat(self._progress, computed_s=lambda: self._computed_s())

    def work(self) -> tuple[int, bool] | None:
        """`_progress` once this rank takes part in steps; None before, and while the ring is formed again."""
        return None if self.comm is None else self._progress()

    def _progress(self) -> tuple[int, bool]:
        """For the heartbeat: a counter that grows while this rank works, and whether it should."""
        comm = self.comm or self.ring
        if comm is None:
            return 0, False
        working = self._following or (self.leader is not None and self.leader.stepping)
        return comm.sequence, working and not comm.waiting

    def _show(self, progress: Progress) -> None:
        if self.leader is not None:
            self.leader.tell(progress)

    def _end(self, why: str) -> None:
        """Whoever started this process is gone. From any thread."""
        self._unneeded = why
        if self.ring is not None:
            self.ring.abort(why)
        else:  # wherever the main thread waits
            signal.pthread_kill(int(threading.main_thread().ident or 0), signal.SIGTERM)


def _report(error: BaseException, rank: int, frontend: Frontend | None) -> int:
    """Tell the frontend, or whoever reads stderr, why this rank ends; its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, RingLMError):
        kind, text, status = error.kind, str(error), error.exit_status
    else:
        kind, text, status = "InternalError", f"{type(error).__name__}: {error}", 1
    unforeseen = None if isinstance(error, RingLMError) else error
    told = frontend is not None and rank == 0
    if unforeseen is not None or not told:
        log.error("%s: %s", kind, text, exc_info=unforeseen)
    if frontend is not None and told:
        with contextlib.suppress(ChannelClosed):
            frontend.send(Failed(kind, text, error.rank if isinstance(error, PeerError) else None))
    return status


def main() -> int:
    """The engine process; its exit status."""
    parser = argparse.ArgumentParser(prog="ringlm-worker")
    parser.add_argument("--spec", type=int, required=True)
    parser.add_argument("--channel", type=int)
    arguments = parser.parse_args()
    engine = spec.receive(arguments.spec)
    rank = engine.ring.rank if engine.ring is not None else 0
    frontend = Frontend(arguments.channel) if arguments.channel is not None else None
    worker = Worker(engine, frontend)
    leave_when_idle(worker.work)
    try:
        logs.inherit(rank if engine.join is None else None)
        log.debug("started")
        worker.run()
    except BaseException as error:  # noqa: BLE001 - the last place; every kind is reported
        status = _report(error, rank, frontend)
        sys.stderr.flush()
        # At an ordinary exit torch awaits its threads, and one of them may await a rank that is lost.
        os._exit(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
