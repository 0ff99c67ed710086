"""The engine process's line to the process that it works for. Knows no engine and no ring."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator

import msgspec

from ringlm.cluster import messages
from ringlm.cluster.channel import Channel, ChannelClosed
from ringlm.cluster.compiling import Compiled
from ringlm.cluster.messages import Cancel, Embed, Shutdown, Submit, Vocabulary

FRONTEND_SILENCE_S = 3.0

Asked = Vocabulary | Submit | Embed | Cancel | Compiled


class Frontend:
    """Rank 0's line to the process that it works for: a thread receives, the engine's thread takes.

    A daemon of the same parent has one too, by which it learns that the parent has ended.
    """

    def __init__(self, fd: int) -> None:
        self._channel: Channel[messages.ToEngine] = Channel(socket.socket(fileno=fd), messages.ToEngine)
        self.on_end: Callable[[], None] = lambda: None
        self._inbox: queue.SimpleQueue[Asked | Shutdown | None] = queue.SimpleQueue()
        self._heard = time.monotonic()
        threading.Thread(target=self._receive, name="ringlm-frontend", daemon=True).start()

    def alive(self) -> bool:
        """Whether the frontend has spoken lately; one that is stopped takes its ring's heartbeat with it."""
        return time.monotonic() - self._heard < FRONTEND_SILENCE_S

    def messages(self, wait_s: float) -> Iterator[Asked | Shutdown]:
        """What has arrived, or was put there; waits up to `wait_s` for the first. Raises ChannelClosed at the
        frontend's end."""
        with contextlib.suppress(queue.Empty):
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while True:
                if message is None:
                    raise ChannelClosed
                yield message
                message = self._inbox.get_nowait()

    def put(self, message: Compiled) -> None:
        """Let the engine's thread find it among what arrives. For any thread."""
        self._inbox.put(message)

    def send(self, *messages: msgspec.Struct) -> None:
        """In one write, if any. Raises ChannelClosed."""
        if messages:
            self._channel.send(*messages)

    def _receive(self) -> None:
        try:
            while True:
                message = self._channel.receive()
                self._heard = time.monotonic()
                if isinstance(message, Vocabulary | Submit | Embed | Cancel | Shutdown):
                    self._inbox.put(message)
        except ChannelClosed:
            self._inbox.put(None)
            self.on_end()
