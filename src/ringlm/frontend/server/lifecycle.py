"""`ringlm serve`: from a free port over a ring that is ready to the last answer of a server that ends.

The port is bound first and heard last: nothing loads for a port that is taken, and nobody connects to a server that
cannot answer yet.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from ringlm import logs
from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError
from ringlm.frontend.metrics import Metrics
from ringlm.frontend.options import EngineOptions
from ringlm.frontend.progress import StartUp
from ringlm.frontend.secret import invite
from ringlm.frontend.server.app import build
from ringlm.frontend.server.auth import read_keys
from ringlm.frontend.server.monitor import Monitor
from ringlm.frontend.server.options import ServeOptions
from ringlm.frontend.server.requests import Bodies
from ringlm.frontend.server.service import Service
from ringlm.frontend.session import Session

HEAD_S = 30.0  # for a connection to send the head of its next request
TELL_S = 2.0  # how long a server whose ring is lost still says so
BACKLOG = 2048
REJOIN_S = 30.0

log = logging.getLogger("ringlm.server")


def serve(engine: EngineOptions, options: ServeOptions) -> None:
    """The whole command. On a daemon it does not return; its process becomes the engine's.

    Returns after a signal and the last answer; raises what has ended the engine.
    """
    logs.configure(options.log_json, options.log_level)
    model, spec = engine.resolve(awaits=options.world_size, rejoin_timeout_s=REJOIN_S)
    if spec.ring is not None and spec.ring.rank != 0:
        from ringlm.cluster.client import serve_rank

        serve_rank(spec)
    keys = read_keys(options.api_key or (), options.api_key_file)
    with _bind(options.host, options.port) as sock:
        if spec.awaits:
            assert spec.ring is not None
            invite(spec.ring, "join", spec.world_size - 1, log.info)
        with StartUp() as progress:
            session = Session.start(spec, model, progress.show, options.chat_template, options.tool_format)
        with session:
            _try_out(session)
            metrics = Metrics(session.ready)
            monitor = Monitor(session, metrics)
            # Unless told otherwise also by what it was asked for, such as demo.
            own = dict.fromkeys(filter(None, (session.ready.model, engine.model)))
            names = tuple(options.served_model_name or own)
            bodies = Bodies(options.max_body * 1_000_000)
            service = Service(session, names, bodies, metrics, monitor, int(time.time()))
            _listen(sock, options)
            app = build(service, keys, options.allow_origin or ())
            say_ready = partial(_say_ready, sock, names[0], session.ready.world_size, bool(keys))
            asyncio.run(_run(app, sock, monitor, options.drain_timeout, say_ready))
            if session.failure is not None:
                raise session.failure


async def _run(
    app: ASGIApp, sock: socket.socket, monitor: Monitor, drain_timeout_s: int, say_ready: Callable[[], None]
) -> None:
    """Serve until a signal or the engine's end; ready is said once signals are heeded.

    Answers under way are finished, unless a second signal comes.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(HEAD_S) + 1,
        timeout_graceful_shutdown=drain_timeout_s,
        backlog=BACKLOG,
    )
    server = _Server(config)
    serving = asyncio.ensure_future(server.serve([sock]))

    def end() -> None:
        if server.should_exit:
            serving.cancel()
        else:
            log.info("ending; answers under way have %d s, a second signal ends them", drain_timeout_s)
            server.should_exit = True

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end)
    say_ready()
    failure = asyncio.ensure_future(monitor.failure())
    await asyncio.wait({serving, failure}, return_when=asyncio.FIRST_COMPLETED)
    if failure.done():
        await asyncio.sleep(TELL_S)
        server.should_exit = True
    failure.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await serving


class _Server(uvicorn.Server):
    """Leaves signals to its owner."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """A connection, which is closed when the head of its next request takes too long: uvicorn waits for ever once its
    first byte is there."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._late is not None:
            self._late.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_head()

    def _await_head(self) -> None:
        if self._late is not None:
            self._late.cancel()
        self._late = self.loop.call_later(HEAD_S, self._close_idle)

    def _close_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def _bind(host: str, port: int) -> socket.socket:
    """A socket at that address, to which nobody can connect yet. Raises ConfigError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--host {host} is not an address of this machine: {error}.") from error
    sock = socket.socket(family, kind, protocol)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        sock.close()
        raise _unusable(host, port, error) from error
    return sock


def _listen(sock: socket.socket, options: ServeOptions) -> None:
    """Let clients connect. Raises ConfigError where another process was faster."""
    try:
        sock.listen(BACKLOG)
    except OSError as error:
        raise _unusable(options.host, options.port, error) from error


def _unusable(host: str, port: int, error: OSError) -> ConfigError:
    if error.errno == errno.EADDRINUSE:
        return ConfigError(f"port {port} of {host} is taken; give another with --port, or end what listens there.")
    return ConfigError(f"--host {host} --port {port}: cannot listen there: {error.strerror}.")


def _try_out(session: Session) -> None:
    """One token by all ranks: what is announced works. Raises what has ended the engine."""
    token = next(iter(session.ready.eos_token_ids), 0)
    session.complete([token], SamplingParams(max_tokens=1, temperature=0.0)).result()


def _say_ready(sock: socket.socket, model: str, world_size: int, needs_key: bool) -> None:
    host, port = sock.getsockname()[:2]
    if not needs_key and not ipaddress.ip_address(host.partition("%")[0]).is_loopback:
        log.warning("whoever reaches %s may ask: there is no key; set one with --api-key-file", host)
    shown = f"[{host}]" if ":" in host else host
    log.info("ready: http://%s:%d/v1 answers for %s, world size %d", shown, port, model, world_size)
