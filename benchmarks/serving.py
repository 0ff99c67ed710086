"""What serving costs and gains, over HTTP: the figures that a server of this project must show, in one interleaved run.

    python benchmarks/serving.py [-m demo] [--world-size 2] [--quant none] [--rounds 5] [--json]

Two servers are started (`ringlm launch -n 2 -- serve`), one of which takes one request at a time; they take turns, so
that all see the same weather. Each figure has what is wanted of it:

    batching    tokens per second of 16 streams over those of one (more than 5)
    prompt      the 90th percentile of the times between four streams' tokens while a prompt of 2,000 is read, over the
                median without (at most 4)
    prefix      time to the first token of a chat's second turn after 1,500 tokens, none of which the server knows, over
                that of one whose first turn it has answered (more than 5)
    beside      the part of the time between two tokens of one stream that is not the forward pass (at most 10%)
    crowd       how much longer that time gets with 100 streams waiting and /metrics asked for (at most 5%)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import NamedTuple

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from ringlm.frontend.endpoint import Answer, Endpoint, connect, find
from ringlm.frontend.rows import percentile

START_S = 300.0
SETTLE_S = 1.0  # after a change of the load
WATCH_S = 2.5  # what a figure is taken of
LONG = 4000  # tokens of a stream that is ended before it has them


class Figure(NamedTuple):
    """What a round or all of them gave: the figure, and the two times (ms) or rates (1/s) that it is made of."""

    value: float
    this: float
    that: float


class Servers(NamedTuple):
    """One that takes 16 requests at a time, as completions and as chat, and one that takes one."""

    many: Endpoint
    chat: Endpoint
    single: Endpoint


@contextlib.contextmanager
def served(options: argparse.Namespace, max_seqs: int) -> Iterator[str]:
    """A server of its own processes; where its API begins, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["-m", options.model, "--quant", options.quant, "--dtype", options.dtype, "--max-seqs", str(max_seqs)]
    command = [sys.executable, "-m", "ringlm", "launch", "-n", str(options.world_size), "--", "serve", *arguments]
    with subprocess.Popen([*command, "--port", str(port), "--log-level", "warning"], stdout=sys.stderr) as process:
        try:
            deadline = time.monotonic() + START_S
            while not _healthy(port):
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, f"the server does not answer within {START_S:.0f} s"
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60.0)


def _healthy(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/health").status_code == 200
    except httpx2.TransportError:
        return False


async def batching(servers: Servers) -> Figure:
    rates = [await _rate(servers.many, streams) for streams in (1, 16)]
    return Figure(rates[1] / rates[0], rates[0], rates[1])


async def _rate(endpoint: Endpoint, streams: int) -> float:
    """Tokens per second while all of them decode."""
    answers = await asyncio.gather(*(endpoint.answer(endpoint.prompt(), 64) for _ in range(streams)))
    begin, end = max(answer.parts[0] for answer in answers), min(answer.parts[-1] for answer in answers)
    return sum(begin < part <= end for answer in answers for part in answer.parts) / (end - begin)


async def prompt(servers: Servers) -> Figure:
    long = await servers.many.sized(2000)
    async with _running(servers.many, 4) as streams:
        quiet = time.perf_counter(), await _later(WATCH_S)
        answer = await long.answer(long.prompt(), 1)
    before = [gap for each in streams for gap in _gaps(each, *quiet)]
    during = [gap for each in streams for gap in _gaps(each, answer.began, answer.parts[0])]
    median, ninetieth = percentile(before, 50), percentile(during, 90)
    return Figure(ninetieth / median, median * 1e3, ninetieth * 1e3)


async def prefix(servers: Servers) -> Figure:
    chat = await servers.chat.sized(1500)
    first = {"role": "user", "content": chat.prompt()}
    said = {"role": "assistant", "content": (await chat.answer([first], 16)).text}
    unknown = first | {"content": chat.prompt()}
    question = {"role": "user", "content": "Go on."}
    known_s, unknown_s = [(await chat.answer([begin, said, question], 2)).first_s for begin in (first, unknown)]
    return Figure(unknown_s / known_s, known_s * 1e3, unknown_s * 1e3)


async def beside(servers: Servers) -> Figure:
    before = await _counters(servers.many)
    answer = await servers.many.answer(servers.many.prompt(), 64)
    await asyncio.sleep(SETTLE_S + 1.0)  # the engine reports once a second, and after its work
    after = await _counters(servers.many)
    names = ("ringlm_forward_seconds_total", "ringlm_steps_total")
    forward_s, steps = (after[name] - before[name] for name in names)
    between_s = (answer.parts[-1] - answer.parts[0]) / (answer.tokens - 1)
    forward_s /= steps
    return Figure(1 - forward_s / between_s, forward_s * 1e3, between_s * 1e3)


async def _counters(endpoint: Endpoint) -> dict[str, float]:
    families = text_string_to_metric_families(await _metrics(endpoint))
    return {sample.name: sample.value for family in families for sample in family.samples}


async def _metrics(endpoint: Endpoint) -> str:
    return (await endpoint.client.get(endpoint.client.base_url.copy_with(path="/metrics"))).text


async def crowd(servers: Servers) -> Figure:
    single = servers.single
    windows = []
    async with _running(single, 1) as streams:
        windows.append((time.perf_counter(), await _later(WATCH_S)))
        others = [asyncio.create_task(single.answer(single.prompt(), 16)) for _ in range(100)]
        await asyncio.sleep(SETTLE_S)
        began = time.perf_counter()
        while time.perf_counter() < began + WATCH_S:
            await _metrics(single)
            await asyncio.sleep(0.5)
        windows.append((began, time.perf_counter()))
        assert not any(other.done() for other in others), "who should wait does not"
        await _end(others)
        windows.append((time.perf_counter(), await _later(WATCH_S)))
    quiet_s, crowded_s, again_s = (statistics.mean(_gaps(streams[0], *window)) for window in windows)
    alone_s = (quiet_s + again_s) / 2  # a text that grows takes longer
    return Figure(crowded_s / alone_s - 1, alone_s * 1e3, crowded_s * 1e3)


@contextlib.asynccontextmanager
async def _running(endpoint: Endpoint, count: int) -> AsyncIterator[list[list[float]]]:
    """When the parts of so many streams come, which run while the block does and have settled when it begins."""
    parts: list[list[float]] = [[] for _ in range(count)]
    streams = [asyncio.create_task(endpoint.answer(endpoint.prompt(), LONG, each)) for each in parts]
    await asyncio.sleep(SETTLE_S)
    yield parts
    assert not any(stream.done() for stream in streams), "a stream has ended too soon"
    await _end(streams)


async def _end(requests: list[asyncio.Task[Answer]]) -> None:
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    await asyncio.sleep(SETTLE_S)


async def _later(seconds: float) -> float:
    await asyncio.sleep(seconds)
    return time.perf_counter()


def _gaps(parts: list[float], begin: float, end: float) -> list[float]:
    """The times between two parts, of those that ended between `begin` and `end`."""
    return [after - before for before, after in itertools.pairwise(parts) if begin < after <= end]


FIGURES: dict[str, tuple[Callable[[Servers], Coroutine[None, None, Figure]], str, str]] = {
    "batching": (batching, "> 5", "1 and 16 streams, tokens/s"),
    "prompt": (prompt, "<= 4", "median without, 90th percentile with, ms"),
    "prefix": (prefix, "> 5", "known and unknown, ms"),
    "beside": (beside, "<= 0.1", "forward pass, between tokens, ms"),
    "crowd": (crowd, "<= 0.05", "alone and in the crowd, ms"),
}


async def measure(options: argparse.Namespace, many: str, single: str) -> dict[str, Figure]:
    wanted = options.figures.split(",")
    async with connect(many, None) as client, connect(single, None) as other:
        endpoint = dataclasses.replace(await find(client, None), words=16)
        servers = Servers(
            endpoint,
            dataclasses.replace(endpoint, api="chat/completions"),
            dataclasses.replace(await find(other, None), words=16),
        )
        rounds: dict[str, list[Figure]] = {name: [] for name in wanted}
        for turn in range(options.rounds + 1):
            for name in wanted:
                figure = await FIGURES[name][0](servers)
                if turn:  # the first warms up
                    rounds[name].append(figure)
    return {
        name: Figure(*(statistics.median(column) for column in zip(*each, strict=True)))
        for name, each in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--world-size", type=int, default=2)
    parser.add_argument("--quant", default="none", choices=["none", "int8", "int4"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figures", default=",".join(FIGURES), help="some of them")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with served(options, 16) as many, served(options, 1) as single:
        figures = asyncio.run(measure(options, many, single))
    if options.json:
        print(json.dumps({name: figure._asdict() for name, figure in figures.items()}))
        return
    table = Table(title=f"{options.model}, {options.quant}, {options.world_size} ranks, medians of {options.rounds}")
    for heading in ("", "figure", "wanted", "of", "", ""):
        table.add_column(heading, justify="right" if heading == "figure" else "left")
    for name, figure in figures.items():
        _, target, what = FIGURES[name]
        table.add_row(name, f"{figure.value:.2f}", target, f"{figure.this:.1f}", f"{figure.that:.1f}", what)
    Console().print(table)


if __name__ == "__main__":
    main()
