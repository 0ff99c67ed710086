"""What `ringlm doctor` shows: tables on a terminal, text in a pipe. Knows what was found, not how."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence

from ringlm.cluster.memory import size
from ringlm.frontend import console
from ringlm.frontend.diagnosis import Machine, Report, speed


def show_machines(report: Report) -> None:
    """A row a machine, then versions and devices of those that are alike."""
    rows = []
    for machine in report.machines:
        found = machine.findings
        reads, tera = f"{found.read_bytes_per_s / 1e9:,.1f} GB/s", found.flops / 1e12
        computes = f"{tera:.3g} TFLOP/s" if tera >= 1 else f"{tera * 1e3:.3g} GFLOP/s"
        threads = str(found.threads) if found.device == "cpu" else ""
        rows.append([str(machine.rank), found.host, found.device, threads, size(machine.free_bytes), reads, computes])
    console.table("Machines", ["rank", "host", "device", "threads", "free", "reads", "computes"], rows)
    for text, ranks in _alike(report.machines):
        _say(f"{ranks}: {text}", "  ")


def _alike(machines: Sequence[Machine]) -> Iterator[tuple[str, str]]:
    """Versions and devices, and which ranks have them."""
    for kind in ("versions", "devices"):
        said: dict[str, list[str]] = {}
        for machine in machines:
            found = machine.findings
            versions = f"ringlm {found.ringlm}, Python {found.python}, torch {found.torch}, {found.system}"
            said.setdefault(versions if kind == "versions" else "; ".join(found.devices), []).append(str(machine.rank))
        for text, ranks in said.items():
            yield text, f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}"


def show_links(report: Report) -> None:
    """A row a link, if there are any."""
    if not report.links:
        return
    rows = []
    for link in report.links:
        row = [f"{link.rank} – {link.other}", f"{link.interface} – {link.other_interface}"]
        if link.round_trip_s is None or link.to_other_bytes_per_s is None or link.from_other_bytes_per_s is None:
            rows.append([row[0], "", "not measured", "", ""])
            continue
        ways = speed(link.to_other_bytes_per_s), speed(link.from_other_bytes_per_s)
        rows.append([*row, f"{link.round_trip_s * 1e3:.2f} ms", *ways])
    console.write("\n")
    console.table("Links", ["ranks", "interfaces", "round trip", "there", "back"], rows)


def show_outlook(report: Report) -> None:
    """What a model would do, if one was named, and what would help."""
    outlook = report.outlook
    if outlook is not None:
        step_s = outlook.read_s + outlook.sums * outlook.sum_s
        weights = outlook.dtype if outlook.quant == "none" else f"{outlook.quant} weights, {outlook.dtype}"
        rows = [[str(one.rank), size(one.read_bytes), f"{one.seconds * 1e3:.2f} ms"] for one in outlook.shares]
        console.write("\n")
        console.table(f"{outlook.model}, {weights}: a step of one token", ["rank", "reads", "in"], rows)
        at = "memory" if outlook.slowest is None else f"the link {outlook.slowest[0]} – {outlook.slowest[1]}"
        sums = f"{outlook.sums} sums over {at} take {outlook.sums * outlook.sum_s * 1e3:.2f} ms"
        reading = f"reading takes {outlook.read_s * 1e3:.2f} ms ({outlook.read_s / step_s:.0%})"
        limit = "links limit" if outlook.limit == "links" else "memory limits"
        _say(
            f"At most {outlook.tokens_per_s:,.1f} tok/s of an answer, which {limit}: "
            f"{reading}{f', {sums}' if outlook.sums else ''}.",
            "  ",
        )
        _say(f"At most {outlook.prompt_tokens_per_s:,.0f} tok/s of prompts.", "  ")
    console.write("\n")
    for sentence in report.advice or ["Nothing is in the way."]:
        _say(sentence, "* " if report.advice else "")


def _say(text: str, lead: str) -> None:
    """A line, wrapped at words for who reads it on a terminal."""
    if sys.stdout.isatty():
        text = textwrap.fill(text, shutil.get_terminal_size().columns - len(lead), break_long_words=False)
    console.write(textwrap.indent(text, " " * len(lead)).replace(" " * len(lead), lead, 1) + "\n")
