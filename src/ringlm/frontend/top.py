"""`ringlm top`: what a server says of its ring, drawn again every second. Knows reports, no engine and no HTTP."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

import msgspec
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ringlm.errors import ConnectError, RingError
from ringlm.frontend import console
from ringlm.frontend.command_options import TopOptions
from ringlm.frontend.server.monitor import Link
from ringlm.frontend.server.status import Rank, RingReport
from ringlm.frontend.status import Server, size

_PERIOD_S = 1.0
_REMEMBERED = 40  # rates in the curve
_BAR = 40  # characters
_HEIGHTS = " ▁▂▃▄▅▆▇█"


def top(options: TopOptions) -> None:
    """The whole command, until Ctrl-C. Raises ConnectError where no server answers at first, ConfigError without the
    key, RingError where there is no ring to tell of."""
    with Server(options.url, options.api_key) as server:
        report = _report(server)
        if options.json:
            print(msgspec.json.encode(report).decode(), flush=True)
            return
        shown = console.stdout()
        rates = deque([_rate(report)], _REMEMBERED)
        if options.once or not shown.is_terminal:
            shown.print(drawn(report, rates, framed=shown.is_terminal))
            return
        with Live(drawn(report, rates, framed=True), console=shown, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(_PERIOD_S)
                try:
                    report = _report(server)
                except (ConnectError, RingError) as error:  # it may come back
                    live.update(Text(console.escape(str(error)), "red"), refresh=True)
                    continue
                rates.append(_rate(report))
                live.update(drawn(report, rates, framed=True), refresh=True)


def _report(server: Server) -> RingReport:
    report = server.report()
    if report is None:
        raise RingError(f"{server.base}: {server.reason() or 'it tells nothing of its ring'}")
    return report


def _rate(report: RingReport) -> float:
    return report.tokens_per_s if report.running and report.lost is None else 0.0


def drawn(report: RingReport, rates: Sequence[float], framed: bool) -> Group:
    """The ring as lines and tables; `rates` are the last tokens per second, the newest last."""
    quant = "" if report.quant == "none" else f" {report.quant}"
    title = f"{report.model} · {report.dtype}{quant} · world size {report.world_size} · "
    state = "ready" if report.lost is None else f"rank {report.lost} is lost, and awaited: {report.reason}"
    again = f" · formed again: {report.recoveries}" if report.recoveries else ""
    head = Text.assemble(
        (console.escape(title), "bold"), (console.escape(state), "green" if report.lost is None else "bold red"), again
    )
    lines = Table.grid(padding=(0, 2))
    lines.add_row("tokens/s", _curve(rates), f"{rates[-1]:.1f} now, {max(rates):.1f} at most")
    if report.step is not None:
        step, ring = report.step.seconds, report.step.ring_s
        split = f"{step * 1e3:.1f} ms = computing {(step - ring) * 1e3:.1f} + ring {ring * 1e3:.1f}"
        lines.add_row("a step", _bar(1 - ring / step, ring / step), split)
    if report.cache is not None:
        used, kept, blocks = report.cache.in_use, report.cache.cached, report.cache.blocks
        lines.add_row("cache", _bar(used / blocks, kept / blocks), f"{used} of {blocks} blocks in use, {kept} kept")
    lines.add_row("requests", "", f"{report.running or 0} running, {report.waiting or 0} waiting")
    weights = sum(rank.weights_bytes for rank in report.ranks) or 1
    columns = ["rank", "host", "device", "threads", "share", "weights", "peak", "health"]
    ranks = [_rank(rank, rank.weights_bytes / weights, report.lost) for rank in report.ranks]
    tables = [console.drawn_table("", columns, ranks, framed)]
    if report.links:
        columns = ["link", "round trip", "there", "back"]
        tables.append(console.drawn_table("", columns, [_link(link, rates[-1] > 0) for link in report.links], framed))
    return Group(head, "", lines, "", *tables)


def _rank(rank: Rank, share: float, lost: int | None) -> list[str]:
    health = "lost" if rank.rank == lost else "well" if rank.slow is None else f"{rank.slow:.1f} times slower"
    sizes = [size(rank.weights_bytes), size(rank.peak_bytes)]
    return [str(rank.rank), rank.host, rank.device, str(rank.threads), f"{share:.0%}", *sizes, health]


def _link(link: Link, busy: bool) -> list[str]:
    trip = "" if link.round_trip_s is None else f"{link.round_trip_s * 1e3:.2f} ms"
    moved = [f"{size(rate)}/s" for rate in (link.there_per_s, link.back_per_s)] if busy else ["", ""]
    return [f"{link.ranks[0]} - {link.ranks[1]}", trip, *moved]


def _bar(first: float, second: float) -> Text:
    """Two parts of a whole."""
    one, both = round(_BAR * first), round(_BAR * min(1.0, first + second))
    return Text.assemble(("█" * one, "blue"), ("▒" * (both - one), "blue"), ("·" * (_BAR - both), "dim"))


def _curve(rates: Sequence[float]) -> Text:
    most = max(*rates, 1.0)
    heights = "".join(_HEIGHTS[round(rate / most * (len(_HEIGHTS) - 1))] for rate in rates)
    return Text(heights.rjust(_BAR), "blue")
