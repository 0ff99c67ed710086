"""Cables that delay, throttle, stall, cut, half-close and damage what they carry: as a relay before a port, or as a
shim in place of a link's socket. One thread carries all of them. Knows nothing of what the bytes mean.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import random
import socket
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

_LOOK_S = 0.02
_T = TypeVar("_T")


@dataclasses.dataclass
class Weather:
    """What befalls all cables that share it, from now on; any thread may change it. `open`: new ones may be made."""

    delay_s: float = 0.0
    bytes_per_s: float = math.inf
    stalled: bool = False
    open: bool = True


class Way:
    """One direction of a cable: `passed` bytes so far, of which bit `flip` is inverted."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, flip: int | None = None) -> None:
        self.passed = 0
        self.flip = flip
        self.writer = writer
        self.task: asyncio.Task[None]
        self._reader = reader
        self._deaf = False

    def end(self) -> None:
        """Tell the receiver that nothing more comes, and take what comes all the same. On the cables' thread."""
        if not self._deaf and not self.writer.is_closing():
            self._deaf = True
            with contextlib.suppress(OSError):  # it has left, and who carries finds that, too
                self.writer.write_eof()

    async def carry(self, weather: Weather) -> None:
        """Until the end of what comes, which is passed on as well."""
        while data := bytearray(await self._reader.read(1 << 16)):
            await asyncio.sleep(weather.delay_s + len(data) / weather.bytes_per_s)
            while weather.stalled:
                await asyncio.sleep(_LOOK_S)
            if self._deaf:
                continue
            at = -1 if self.flip is None else self.flip // 8 - self.passed
            if 0 <= at < len(data):
                data[at] ^= 1 << (self.flip or 0) % 8
            self.passed += len(data)
            self.writer.write(data)
            await self.writer.drain()
        self.end()


class Cable:
    """Two connected sockets that see each other's bytes; `ways` are from the near one to the far one, and back."""

    def __init__(self, weather: Weather, ways: tuple[Way, Way]) -> None:
        self.ways = ways
        self._weather = weather

    async def carry(self) -> None:
        """Until both ends have closed, or one breaks."""
        for way in self.ways:
            way.task = asyncio.ensure_future(way.carry(self._weather))
        try:
            await asyncio.gather(*(way.task for way in self.ways))
        except (OSError, asyncio.CancelledError):
            pass  # an end broke it off, or it was cut: both ends are told below
        finally:
            for way in self.ways:
                way.task.cancel()
                way.writer.transport.abort()


class Cables:
    """A context manager: the thread, and all that it carries."""

    def __init__(self) -> None:
        self.used = threading.Event()  # once a relay has been dialled
        self._loop = asyncio.new_event_loop()
        self._carrying: set[asyncio.Task[None]] = set()
        self._servers: list[asyncio.Server] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name="cables", daemon=True)
        self._thread.start()

    def relay(self, port: int) -> Relay:
        """A relay of which `port` of this machine is the far end."""
        return self._do(self._listen(port))

    def shim(self, sock: socket.socket, *, flip: int | None = None, weather: Weather | None = None) -> socket.socket:
        """A socket to take in place of `sock`, at the near end of a cable; bit `flip` of what comes is inverted."""
        near, inner = socket.socketpair()
        self.join(inner, sock, back=flip, weather=weather)
        return near

    def join(
        self,
        near: socket.socket,
        far: socket.socket,
        *,
        there: int | None = None,
        back: int | None = None,
        weather: Weather | None = None,
    ) -> Cable:
        """A cable between two sockets; bit `there` of what goes from near to far is inverted, `back` of the rest."""
        return self._do(self._join(near, far, there, back, weather or Weather()))

    def call(self, what: Callable[[], None]) -> None:
        """`what`, on the thread; after it has been done."""

        async def do() -> None:
            what()

        self._do(do())

    def close(self) -> None:
        async def end() -> None:
            for server in self._servers:
                server.close()
            for task in self._carrying:
                task.cancel()
            await asyncio.gather(*self._carrying, return_exceptions=True)

        self._do(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5.0)
        self._loop.close()

    def __enter__(self) -> Cables:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _do(self, what: Coroutine[Any, Any, _T]) -> _T:
        return asyncio.run_coroutine_threadsafe(what, self._loop).result(10.0)

    async def _join(
        self, near: socket.socket, far: socket.socket, there: int | None, back: int | None, weather: Weather
    ) -> Cable:
        ends = [await asyncio.open_connection(sock=sock) for sock in (near, far)]
        (near_reader, near_writer), (far_reader, far_writer) = ends
        cable = Cable(weather, (Way(near_reader, far_writer, there), Way(far_reader, near_writer, back)))
        self._keep(asyncio.ensure_future(cable.carry()))
        return cable

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._carrying.add(task)
        task.add_done_callback(self._carrying.discard)

    async def _listen(self, port: int) -> Relay:
        relay = Relay(self)

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.used.set()
            try:
                if not relay.weather.open:
                    raise ConnectionRefusedError
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                writer.transport.abort()  # nobody is there yet; the dialler tries again
                return
            cable = Cable(relay.weather, (Way(reader, far_writer), Way(far_reader, writer)))
            relay.cables.add(cable)
            try:
                await cable.carry()
            finally:
                relay.cables.discard(cable)

        def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._keep(asyncio.ensure_future(accept(reader, writer)))

        server = await asyncio.start_server(accepted, "127.0.0.1", 0)
        self._servers.append(server)
        relay.port = server.sockets[0].getsockname()[1]
        return relay


class Relay:
    """Listens on `port` of loopback in the place of another; made by `Cables.relay`. Its `weather` is that of all its
    `cables`."""

    def __init__(self, cables: Cables) -> None:
        self.port = 0
        self.weather = Weather()
        self.cables: set[Cable] = set()
        self._thread = cables

    def clear(self) -> None:
        """No weather any more."""
        calm = Weather()
        for field in dataclasses.fields(Weather):
            setattr(self.weather, field.name, getattr(calm, field.name))

    def cut(self) -> None:
        """End every cable that there is."""

        def end() -> None:
            for cable in self.cables:
                cable.ways[0].task.cancel()

        self._thread.call(end)

    def half_close(self, draw: random.Random) -> None:
        """End one direction of every cable, and let the other be."""

        def end() -> None:
            for cable in self.cables:
                draw.choice(cable.ways).end()

        self._thread.call(end)

    def damage(self, draw: random.Random) -> None:
        """Invert a bit of what comes soon, in one direction of every cable."""

        def spoil() -> None:
            for cable in self.cables:
                way = draw.choice(cable.ways)
                way.flip = 8 * way.passed + draw.randrange(8 * 64)

        self._thread.call(spoil)
