"""A stream of server-sent events as a response: headers with the first event, comments while nothing comes or the ring
is being formed again, an end when the client hangs up or reads nothing."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ringlm.frontend.server.errors import APIError, api_error

LOOK_S = 1.0
KEEP_ALIVE_S = 15.0  # proxies cut connections that are silent for a minute
STALL_S = 60.0  # a client that takes nothing for so long is given up

Write = Callable[[Any], Awaitable[None]]  # of a struct

log = logging.getLogger("ringlm.server")


class EventStream(Response):
    """Sends what `produce` writes, each struct an event, then `[DONE]`; or where they are `named`, with the `type` of
    each as its name and no more at the end. While `waits` says for what, a comment repeats that.

    An error before the first event is raised, and so has a status of its own; a later one is the last event, as
    `failed` tells it. `produce` is cancelled when its client hangs up.
    """

    def __init__(
        self,
        produce: Callable[[Write], Awaitable[None]],
        waits: Callable[[], str | None],
        failed: Callable[[APIError], msgspec.Struct] = APIError.body,
        named: bool = False,
    ) -> None:
        super().__init__(
            media_type="text/event-stream", headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        del self.headers["content-length"]
        self._produce = produce
        self._waits = waits
        self._failed = failed
        self._named = named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        out = _Out(send, self.raw_headers, self._named)
        producer = asyncio.ensure_future(self._run(out))
        client = asyncio.ensure_future(until_gone(receive))
        try:
            reads = True
            while reads and not (producer.done() or client.done()):
                await asyncio.wait({producer, client}, timeout=LOOK_S, return_when=asyncio.FIRST_COMPLETED)
                if not (producer.done() or client.done()):
                    reads = await out.keep_alive(self._waits())
            if producer.done():
                producer.result()
            else:
                scope["ringlm.record"].outcome = "its client left"
        finally:
            await cancelled(producer, client)

    async def _run(self, out: _Out) -> None:
        try:
            await self._produce(out.event)
        except Exception as error:
            if not out.started:
                raise
            told = api_error(error)
            if told.status == 500:
                log.exception("a stream broke off")
            await out.event(self._failed(told))
        else:
            if not self._named:
                await out.write(b"data: [DONE]\n\n")
        await out.end()


class _Out:
    """The response's bytes on their way. Waits in `send` are the client's: it has not read what was sent before."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], named: bool) -> None:
        self.started = False
        self._named = named
        self._send = send
        self._headers = headers
        self._encoder = msgspec.json.Encoder()
        self._lock = asyncio.Lock()
        self._last = time.monotonic()  # when something was sent

    async def event(self, data: Any) -> None:
        name = f"event: {data.type}\n".encode() if self._named else b""
        await self.write(name + b"data: " + self._encoder.encode(data) + b"\n\n")

    async def keep_alive(self, awaited: str | None) -> bool:
        """Say what is awaited, or that nothing is new, if so; False when the client has read nothing for too long."""
        silent_s = time.monotonic() - self._last
        if self._lock.locked():
            return silent_s < STALL_S
        if awaited is not None or silent_s >= KEEP_ALIVE_S:
            comment = b": nothing new\n\n" if awaited is None else f": waiting for {awaited}\n\n".encode()
            try:
                await asyncio.wait_for(self.write(comment), STALL_S)
            except asyncio.TimeoutError:
                return False
        return True

    async def write(self, data: bytes) -> None:
        async with self._lock:
            if not self.started:
                self.started = True
                await self._send({"type": "http.response.start", "status": 200, "headers": self._headers})
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._last = time.monotonic()

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


async def until_gone(receive: Receive) -> None:
    """Returns once the client has hung up; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """End tasks, and wait until they have."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
