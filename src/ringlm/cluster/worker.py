"""The engine process of one rank: connect, agree, load, then lead (rank 0) or follow.

    python -m ringlm.cluster.worker --spec FD [--channel FD]

It ends when its frontend or launcher does, when rank 0 says so (status 0), or when a rank is lost
(status 1, which names it). Messages to a person go to stderr, one line each.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

import msgspec

from ringlm import errors, logs
from ringlm.cluster import messages, spec
from ringlm.cluster.agreement import Refused
from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.loading import Loaded, load
from ringlm.cluster.messages import (
    Cancel,
    Embed,
    Embedding,
    Failed,
    LinkStats,
    Output,
    Progress,
    Ready,
    Shutdown,
    Stats,
    Submit,
)
from ringlm.cluster.parent import watch_parent
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.embedding import Vector
from ringlm.engine.engine import Engine
from ringlm.engine.follower import follow
from ringlm.engine.sequence import Delta
from ringlm.errors import PeerError, QueueFullError, RequestError, RingLMError
from ringlm.parallel.communicator import Communicator
from ringlm.ring import Heartbeat, Ring, RingConfig, connect
from ringlm.ring.collectives import last_words

FRONTEND_SILENCE_S = 3.0
_STATS_S = 1.0
_IDLE_S = 0.5  # an idle rank 0 looks this often whether the ring still holds

log = logging.getLogger("ringlm")


class Frontend:
    """Rank 0's line to the process that it works for: a thread receives, the engine's thread takes.

    A daemon of the same parent has one too, by which it learns that the parent has ended.
    """

    def __init__(self, fd: int) -> None:
        self._channel: Channel[messages.ToEngine] = Channel(socket.socket(fileno=fd), messages.ToEngine)
        self.on_end: Callable[[], None] = lambda: None
        self._inbox: queue.SimpleQueue[Submit | Embed | Cancel | Shutdown | None] = queue.SimpleQueue()
        self._heard = time.monotonic()
        threading.Thread(target=self._receive, name="ringlm-frontend", daemon=True).start()

    def alive(self) -> bool:
        """Whether the frontend has spoken lately; one that is stopped takes its ring's heartbeat with it."""
        return time.monotonic() - self._heard < FRONTEND_SILENCE_S

    def messages(self, wait_s: float) -> Iterator[Submit | Embed | Cancel | Shutdown]:
        """What has arrived; waits up to `wait_s` for the first. Raises ChannelClosed at the frontend's end."""
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                if message is None:
                    raise ChannelClosed
                yield message
                message = self._inbox.get_nowait()

    def send(self, *messages: msgspec.Struct) -> None:
        """In one write, if any. Raises ChannelClosed."""
        if messages:
            self._channel.send(*messages)

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._heard = time.monotonic()
                if isinstance(message, Submit | Embed | Cancel | Shutdown):
                    self._inbox.put(message)
        except (ChannelClosed, msgspec.MsgspecError, UnicodeDecodeError):
            self._inbox.put(None)
            self.on_end()


class Worker:
    """One rank of a ring, from start to end."""

    def __init__(self, engine: EngineSpec, frontend: Frontend | None) -> None:
        self.spec = engine
        self.frontend = frontend
        self.config = engine.ring or RingConfig()
        self.ring: Ring | None = None
        self.comm: Communicator | None = None  # the ring, or what it was asked to leave its work to
        self._stats_due = 0.0  # when to tell the figures again, while there is work
        self._stepping = False  # whether `ring.sequence` should grow when no collective is under way

    def run(self) -> None:
        """Raises the RingLMError that ended the ring; returns when it ended in order."""
        loaded = None
        try:
            loaded = self._start()
            self.comm = loaded.comm
            if self.config.rank == 0:
                self._lead(loaded)
            else:
                self._stepping = True  # a daemon that is not within a collective computes
                follow(loaded.runner, loaded.comm)
        except BaseException as error:
            if self.ring is not None and not isinstance(error, PeerError | Refused):
                self.ring.abort(last_words(error))
            raise
        finally:
            if self.ring is not None:
                self.ring.close()

    def _start(self) -> Loaded:
        self._tell(Progress("connect"))

        def join(fingerprint: str) -> Ring:
            # Only rank 0's frontend speaks; a daemon learns of its parent's end from the channel's.
            heartbeat = Heartbeat(self._progress)
            if self.frontend is not None and self.config.rank == 0:
                heartbeat = Heartbeat(self._progress, self.frontend.alive)
            self.ring = connect(self.config, fingerprint=fingerprint, heartbeat=heartbeat)
            watch_parent(lambda: self._orphaned("its launcher ended"))
            if self.frontend is not None and self.config.rank != 0:
                self.frontend.on_end = lambda: self._orphaned("its parent process ended")
            return self.ring

        return load(self.spec, join, lambda done, total: self._tell(Progress("load", done, total)))

    def _progress(self) -> tuple[int, bool]:
        """For the heartbeat: a counter that grows while this rank works, and whether it should."""
        comm = self.comm or self.ring
        if comm is None:
            return 0, False
        return comm.sequence, self._stepping and not comm.waiting

    def _orphaned(self, why: str) -> None:
        if self.ring is not None:
            self.ring.abort(why)

    def _lead(self, loaded: Loaded) -> None:
        """Rank 0: hand requests to the engine, step while there is work, hand out what comes of it."""
        frontend = self.frontend
        assert frontend is not None
        engine = Engine(loaded.runner, loaded.comm, max_seqs=loaded.max_seqs)
        frontend.send(loaded.ready)
        try:
            while True:
                for message in frontend.messages(0.0 if engine.has_work else _IDLE_S):
                    if isinstance(message, Shutdown):
                        engine.stop()
                        return
                    self._accept(engine, message)
                if engine.has_work:
                    self._stepping = True
                    news = engine.step()
                    self._stepping = False
                    frontend.send(*self._stats(engine), *map(_told, news))
                elif self.ring is not None:
                    self.ring.check()
        except ChannelClosed:
            raise RingLMError("its frontend ended without a word.") from None

    def _accept(self, engine: Engine, message: Submit | Embed | Cancel) -> None:
        assert self.frontend is not None
        if isinstance(message, Cancel):
            delta = engine.cancel(message.id)
            if delta is not None:
                self.frontend.send(*self._stats(engine), Output(*delta))
            return
        try:
            if isinstance(message, Embed):
                engine.embed(message.id, message.prompt_tokens)
            else:
                engine.submit(message.id, message.prompt_tokens, message.params)
        except RequestError as error:
            self.frontend.send(Output(message.id, [], error=str(error), busy=isinstance(error, QueueFullError)))

    def _stats(self, engine: Engine) -> list[Stats]:
        """The engine's figures when they are to be told: every second while there is work, and once after it."""
        now = time.monotonic()
        if engine.has_work and now < self._stats_due:
            return []
        self._stats_due = now + _STATS_S
        links = [] if self.ring is None else [LinkStats(*figures) for figures in self.ring.figures()]
        return [Stats(*engine.figures, links)]

    def _tell(self, message: Progress | Ready) -> None:
        if self.frontend is not None and self.config.rank == 0:
            self.frontend.send(message)


def _told(news: Delta | Vector) -> Output | Embedding:
    """What the frontend is told of it."""
    return Embedding(news.id, news.values.tobytes()) if isinstance(news, Vector) else Output(*news)


def _report(error: BaseException, rank: int, frontend: Frontend | None) -> int:
    """Tell the frontend, or whoever reads stderr, why this rank ends; its exit status."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return int(error.code or 0)
    if isinstance(error, RingLMError):
        public = next(kind for kind in type(error).__mro__ if hasattr(errors, kind.__name__))
        kind, text, status = public.__name__, str(error), error.exit_status
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


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)


def main() -> int:
    """The engine process; its exit status."""
    parser = argparse.ArgumentParser(prog="ringlm-worker")
    parser.add_argument("--spec", type=int, required=True)
    parser.add_argument("--channel", type=int)
    arguments = parser.parse_args()
    engine = spec.receive(arguments.spec)
    rank = engine.ring.rank if engine.ring is not None else 0
    signal.signal(signal.SIGTERM, _terminate)
    frontend = Frontend(arguments.channel) if arguments.channel is not None else None
    worker = Worker(engine, frontend)
    try:
        logs.inherit(rank)
        worker.run()
    except BaseException as error:  # noqa: BLE001 - the last place; every kind is reported
        status = _report(error, rank, frontend)
        sys.stderr.flush()
        # At an ordinary exit torch awaits its threads, and one of them may await a rank that is lost.
        os._exit(status)
    return 0


if __name__ == "__main__":
    sys.exit(main())
