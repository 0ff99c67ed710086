"""`ringlm status`: what a server that runs says of its ring, as a table. Knows HTTP, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx2
import msgspec

from ringlm.errors import ConfigError, ConnectError, RingError
from ringlm.frontend import console
from ringlm.frontend.server.errors import ErrorInfo
from ringlm.frontend.server.status import Rank, RingReport

_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class StatusOptions:
    """Which server, what it asks for, and how to show what it says."""

    url: str
    api_key: str | None
    json: bool


def status(options: StatusOptions) -> None:
    """The whole command. Raises ConnectError where no server of ringlm's answers, RingError for a ring that is not
    well, and ConfigError without the key."""
    url = options.url if "://" in options.url else f"http://{options.url}"
    base = url.rstrip("/").removesuffix("/v1")
    headers = {"Authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    with httpx2.Client(timeout=_TIMEOUT_S, headers=headers) as client:
        health, ring = (_get(client, base + path) for path in ("/health", "/v1/ring"))
    if ring.status_code in (401, 403):
        raise ConfigError(f"{base} asks for a key; give it with --api-key or RINGLM_API_KEY.")
    reason = None if health.status_code == 200 else _reason(health)
    report = _decode(ring, RingReport) if ring.status_code == 200 else None
    if options.json:
        said = {"healthy": reason is None, "reason": reason, "ring": report}
        print(msgspec.json.encode(said).decode(), flush=True)
    elif report is not None:
        _show(report)
    if reason is not None:
        raise RingError(f"{base}: {reason}")


class _Unwell(msgspec.Struct):
    """What /health says of a ring that is formed again, or is lost."""

    reason: str | None = None
    error: ErrorInfo | None = None


def _get(client: httpx2.Client, url: str) -> httpx2.Response:
    try:
        return client.get(url)
    except (httpx2.RequestError, httpx2.InvalidURL) as error:
        raise ConnectError(f"no server answers at {url}: {str(error) or type(error).__name__}.") from None


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
    moved = ["", ""] if link is None else [_size(link.sent_bytes), _size(link.received_bytes)]
    sizes = [_size(rank.weights_bytes), _size(rank.peak_bytes)]
    slower = "" if rank.slow is None else f"{rank.slow:.1f} times"
    return [str(rank.rank), rank.device, str(rank.threads), *sizes, trip, *moved, slower]


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
