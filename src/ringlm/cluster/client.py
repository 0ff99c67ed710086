"""The frontend's side: start engine processes, submit and cancel requests, receive their tokens. No torch."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import msgspec

from ringlm import errors
from ringlm.cluster import messages, parent, spec
from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.local import local_ring
from ringlm.cluster.order import end, how_ended
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.request import SamplingParams
from ringlm.errors import PeerError, RingError, RingLMError

_PING_S = 1.0
_CLOSE_S = 10.0

log = logging.getLogger("ringlm")


class EngineClient:
    """The engine of rank 0, and of all local ranks, as child processes. Made by `start`.

    Any thread may submit, cancel and close; one calls `next_event`. `ready` and `stats` are the newest; `recovering` is
    why the ring is being formed again, while it is.
    """

    def __init__(self, processes: list[subprocess.Popen[bytes]], channels: list[socket.socket]) -> None:
        self.ready: messages.Ready
        self.stats: messages.Stats | None = None
        self.recovering: messages.Recovering | None = None
        self._processes = processes
        self._sockets = channels
        self._channel: Channel[messages.ToFrontend] = Channel(channels[0], messages.ToFrontend)
        self._ids = itertools.count(1)
        self._failure: RingLMError | None = None
        self._closing = threading.Event()
        self._pinger = threading.Thread(target=self._ping, name="ringlm-ping", daemon=True)

    @classmethod
    def start(cls, engine: EngineSpec, on_progress: Callable[[messages.Progress], None] | None = None) -> EngineClient:
        """Start the engine and wait until every rank is ready.

        Raises the RingLMError that ended the engine. Whatever was started is ended then.
        """
        rings = [engine.ring] if engine.ring is not None or engine.local_ranks == 1 else local_ring(engine.local_ranks)
        processes: list[subprocess.Popen[bytes]] = []
        sockets: list[socket.socket] = []
        try:
            for ring in rings:
                ours, theirs = socket.socketpair()
                sockets.append(ours)
                rank = msgspec.structs.replace(engine, ring=ring)
                with theirs:
                    arguments, fd = spec.command(rank, theirs.fileno())
                    processes.append(_spawn(arguments, (fd, theirs.fileno())))
                    os.close(fd)
        except OSError as error:
            for process in processes:
                process.kill()
            raise RingError(f"an engine process could not be started: {error}.") from error
        client = cls(processes, sockets)
        try:
            client._pinger.start()
            client._await_ready(on_progress)
        except BaseException:
            client.close()
            raise
        return client

    def teach(self, vocabulary: messages.Vocabulary) -> None:
        """Say what tokens stand for, which it must know before the first request with a grammar."""
        self._send(vocabulary)

    def submit(self, prompt_tokens: list[int], params: SamplingParams) -> int:
        """Hand in a request; its id. Its tokens come from `next_event`, and so does what ends the engine now."""
        request = next(self._ids)
        self._send(messages.Submit(request, prompt_tokens, params))
        return request

    def embed(self, prompt_tokens: list[int]) -> int:
        """Hand in a text whose vector is wanted, as `submit` does; it comes as an Embedding."""
        request = next(self._ids)
        self._send(messages.Embed(request, prompt_tokens))
        return request

    def cancel(self, request: int) -> None:
        """End a request; its last Output says CANCELED. One that has ended already is left alone."""
        self._send(messages.Cancel(request))

    def next_event(self, timeout_s: float | None = None) -> messages.Output | messages.Embedding | None:
        """The next news of any request, or None after `timeout_s`. Raises the error that ended the engine."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            message = self._receive(None if deadline is None else max(0.0, deadline - time.monotonic()))
            if message is None or isinstance(message, messages.Output | messages.Embedding):
                return message
            if isinstance(message, messages.Stats):
                self.stats = message
            elif isinstance(message, messages.Recovering):
                self.recovering = message
            elif isinstance(message, messages.Ready):
                self.ready, self.recovering = message, None

    def close(self) -> None:
        """End every rank, by force after a while. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(ChannelClosed):
            self._channel.send(messages.Shutdown())
        deadline = time.monotonic() + (_CLOSE_S if self._failure is None else 2.0)
        for process in self._processes:
            if not end(process, max(0.1, deadline - time.monotonic()), _CLOSE_S):
                log.warning("engine process %d did not end by itself", process.pid)
        self._channel.close()
        for sock in self._sockets[1:]:
            sock.close()

    def __enter__(self) -> EngineClient:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _await_ready(self, on_progress: Callable[[messages.Progress], None] | None) -> None:
        while True:
            message = self._receive(None)
            if isinstance(message, messages.Ready):
                self.ready = message
                return
            if isinstance(message, messages.Progress) and on_progress is not None:
                on_progress(message)

    def _ping(self) -> None:
        while not self._closing.wait(_PING_S):
            try:
                self._channel.send(messages.Ping())
            except ChannelClosed:
                return

    def _send(self, message: msgspec.Struct) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closing.is_set():
            raise _closed()
        with contextlib.suppress(ChannelClosed):  # why is for `next_event` to say
            self._channel.send(message)

    def _receive(self, timeout_s: float | None) -> messages.ToFrontend | None:
        if self._failure is not None:
            raise self._failure
        try:
            message = self._channel.receive(timeout_s)
        except ChannelClosed:
            self._fail(_closed() if self._closing.is_set() else self._unexplained())
        if isinstance(message, messages.Failed):
            self._fail(_error(message))
        return message

    def _unexplained(self) -> RingLMError:
        try:
            status = self._processes[0].wait(2.0)
        except subprocess.TimeoutExpired:
            return RingError("the engine process of rank 0 closed its channel and goes on; it is ended now.")
        return RingError(f"the engine process of rank 0 {how_ended(status)} without a word; was there memory enough?")

    def _fail(self, error: RingLMError) -> NoReturn:
        self._failure = error
        raise error


def _closed() -> RingError:
    return RingError("the engine is closed.")


def serve_rank(engine: EngineSpec) -> NoReturn:
    """Become the engine process of a daemon: this process's memory is replaced and its exit status is the
    daemon's: 0 when rank 0 said so, 1 when it vanished."""
    arguments, _ = spec.command(engine)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(arguments[0], arguments)


def run_rank(engine: EngineSpec) -> int:
    """Serve as a daemon in a child process and wait for its end; its exit status."""
    arguments, fd = spec.command(engine)
    process = _spawn(arguments, (fd,))
    os.close(fd)
    try:
        return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(_CLOSE_S)


def _spawn(arguments: list[str], fds: tuple[int, ...]) -> subprocess.Popen[bytes]:
    # Its own session: Ctrl-C is the frontend's to handle, and what ends the frontend ends it by the channel.
    # Whoever launched the frontend is no parent of its.
    environment = {name: value for name, value in os.environ.items() if name != parent.VARIABLE}
    return subprocess.Popen(
        arguments, pass_fds=fds, env=environment, stdin=subprocess.DEVNULL, stdout=2, start_new_session=True
    )


def _error(failed: messages.Failed) -> RingLMError:
    kind = getattr(errors, failed.kind, None)
    if not (isinstance(kind, type) and issubclass(kind, RingLMError)):
        return RingLMError(failed.message)
    if issubclass(kind, PeerError):
        return kind(failed.message, failed.rank if failed.rank is not None else -1)
    return kind(failed.message)
