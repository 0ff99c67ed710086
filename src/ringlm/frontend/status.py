"""`ringlm status`: what a server that runs says of its ring, as a table. Knows HTTP, no engine."""

from __future__ import annotations

from typing import Any

import httpx2
import msgspec

from ringlm.errors import ConfigError, ConnectError, RingError
from ringlm.frontend import console
from ringlm.frontend.command_options import StatusOptions
from ringlm.frontend.server.errors import ErrorInfo
from ringlm.frontend.server.status import Rank, RingReport

_TIMEOUT_S = 10.0


def status(options: StatusOptions) -> None:
    """The whole command. Raises ConnectError where no server of ringlm's answers, RingError for a ring that is not
    well, and ConfigError without the key."""
    with Server(options.url, options.api_key) as server:
        reason, report = server.reason(), server.report()
    if options.json:
        said = {"healthy": reason is None, "reason": reason, "ring": report}
        print(msgspec.json.encode(said).decode(), flush=True)
    elif report is not None:
        _show(report)
    if reason is not None:
        raise RingError(f"{server.base}: {reason}")


class Server:
    """A server that is asked how its ring does. Raises ConnectError where none of ringlm's answers."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.base = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx2.Client(timeout=_TIMEOUT_S, headers=headers)

    def reason(self) -> str | None:
        """Why it is not well, if so."""
        health = self._get("/health")
        return None if health.status_code == 200 else _reason(health)

    def report(self) -> RingReport | None:
        """What it says of the ring, unless it has none to tell of. Raises ConfigError without the key."""
        ring = self._get("/v1/ring")
        if ring.status_code in (401, 403):
            raise ConfigError(f"{self.base} asks for a key; give it with --api-key or RINGLM_API_KEY.")
        return _decode(ring, RingReport) if ring.status_code == 200 else None

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self._client.close()

    def _get(self, path: str) -> httpx2.Response:
        url = self.base + path
        try:
            return self._client.get(url)
        except (httpx2.RequestError, httpx2.InvalidURL) as error:
            raise ConnectError(f"no server answers at {url}: {str(error) or type(error).__name__}.") from None


class _Unwell(msgspec.Struct):
    """What /health says of a ring that is formed again, or is lost."""

    reason: str | None = None
    error: ErrorInfo | None = None


def _reason(health: httpx2.Response) -> str:
    """Why it is not well."""
    try:
        answer = msgspec.json.decode(health.content, type=_Unwell)
    except msgspec.MsgspecError:
        answer = _Unwell()
    said = answer.reason if answer.error is None else answer.error.message
    return said or f"{health.status_code} {health.reason_phrase}"


def _decode(response: httpx2.Response, kind: type[Any]) -> Any:
    try:
        return msgspec.json.decode(response.content, type=kind)
    except msgspec.MsgspecError as error:
        raise ConnectError(f"{response.url} says what this version of ringlm does not understand: {error}.") from None


def _show(report: RingReport) -> None:
    load = "" if report.running is None else f" · {report.running} running, {report.waiting} waiting"
    quant = "" if report.quant == "none" else f" {report.quant}"
    missing = report.full_world_size > report.world_size
    size = f"{report.world_size} of {report.full_world_size}" if missing else f"{report.world_size}"
    title = (
        f"{report.model} · {report.dtype}{quant} · context {report.context:,} · world size {size} · "
        f"{report.tokens_per_s:.1f} tok/s{load}"
    )
    if report.recoveries or report.spares:
        title += f" · formed again: {report.recoveries} · spares: {report.spares or 0}"
    columns = ["rank", "device", "threads", "weights", "peak", "round trip", "sent", "received", "slower"]
    console.table(title, columns, [_row(rank) for rank in report.ranks])


def _row(rank: Rank) -> list[str]:
    link = rank.link
    trip = "" if link is None or link.round_trip_s is None else f"{link.round_trip_s * 1000:.2f} ms"
    moved = ["", ""] if link is None else [size(link.sent_bytes), size(link.received_bytes)]
    sizes = [size(rank.weights_bytes), size(rank.peak_bytes)]
    slower = "" if rank.slow is None else f"{rank.slow:.1f} times"
    return [str(rank.rank), rank.device, str(rank.threads), *sizes, trip, *moved, slower]


def size(nbytes: float) -> str:
    """In GB, MB or kB."""
    if nbytes >= 1e9:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:.1f} kB"
