"""How a rank waits for its links: it yields the core at first, then sleeps in the kernel, and looks at its deadline.

A spinning rank would hold the core that its peer needs, a sleeping one takes tens of microseconds to wake.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

from ringlm.errors import CollectiveTimeoutError
from ringlm.ring.link import Link
from ringlm.ring.sockets import SPIN_S, yield_core

_POLL_S = 0.5  # a sleeping rank looks this often at its deadline


class Patience:
    """A wait with nothing to do: yield the core at first, then sleep until a link is ready, or `awake` is."""

    def __init__(self, deadline: float, awake: socket.socket | None = None) -> None:
        self._deadline = deadline
        self._awake = awake
        self._stop = 0.0

    def restart(self) -> None:
        """Something has moved."""
        self._stop = 0.0

    def turn(self, links: Sequence[tuple[Link, bool, bool]], late: Link) -> None:
        """Wait a little for `links` (each: to read, to write). Raises CollectiveTimeoutError naming `late`."""
        now = time.perf_counter()
        if now >= self._deadline:
            raise CollectiveTimeoutError(
                f"{late.name} did not take part in the collective in time; it may be busy, stopped or gone.",
                late.peer,
            )
        if not self._stop:
            self._stop = now + SPIN_S
        if now < self._stop:
            yield_core()
            return
        poll = select.poll()
        if self._awake is not None:
            poll.register(self._awake, select.POLLIN)
        for link, read, write in links:
            if write and link.area is not None and link.area.full:
                poll.register(link.area.credits, select.POLLIN)
                write = False
            if read or write:
                poll.register(link.sock, (select.POLLIN if read else 0) | (select.POLLOUT if write else 0))
        poll.poll(max(1.0, 1000.0 * min(_POLL_S, self._deadline - now)))
