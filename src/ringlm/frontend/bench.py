"""`ringlm bench`: tokens per second of prompts and of answers, in llama-bench's words. Token ids only: it needs no
tokenizer, and random weights will do."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from ringlm.cluster.messages import Output
from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError, RequestError
from ringlm.frontend import console
from ringlm.frontend.options import EngineOptions
from ringlm.frontend.progress import StartUp
from ringlm.frontend.switchboard import Engine

_FIRST = 4  # tokens of the prompt before a tg row
_WAIT_S = 600.0  # for news of any request


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """What to measure: `prompt` tokens in, `tokens` out, at each of `concurrency`, `repeat` times after a warm-up."""

    prompt: int
    tokens: int
    concurrency: str
    repeat: int
    json: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line of the result: requests of `prompt` tokens that are answered with `tokens`."""

    test: str
    concurrency: int
    prompt: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Round:
    """What one round of a row gave; `ms` a prompt, or a token of an answer."""

    tokens_per_s: float
    ms: float
    ring_share: float


def bench(engine: EngineOptions, options: BenchOptions) -> None:
    """The whole command. On a daemon it does not return; its process becomes the engine's."""
    rows = _rows(options)
    largest = max(row.concurrency for row in rows)
    if engine.max_seqs is not None and engine.max_seqs < largest:
        raise ConfigError(f"--max-seqs {engine.max_seqs} is less than the concurrency of {largest}; leave it out.")
    longest = max(row.prompt + row.tokens for row in rows)
    engine = dataclasses.replace(engine, max_seqs=largest, context=engine.context or longest)
    _, spec = engine.resolve()
    from ringlm.cluster.client import EngineClient, serve_rank

    if spec.ring is not None and spec.ring.rank != 0:
        serve_rank(spec)
    with StartUp() as progress:
        client = EngineClient.start(spec, progress.show)
    with client:
        if client.ready.context < longest:
            raise ConfigError(f"--context {client.ready.context} is less than the {longest} tokens of a row.")
        rounds: dict[_Row, list[_Round]] = {row: [] for row in rows}
        with console.progress("measuring", (options.repeat + 1) * len(rows)) as advance:
            for turn in range(options.repeat + 1):
                for row in rows:  # all rows see the same weather
                    measured = measure(client, row)
                    if turn:
                        rounds[row].append(measured)
                    advance()
        result = summary(client, spec.settings.backend, rounds)
    if options.json:
        import json

        print(json.dumps(result), flush=True)
    else:
        _show(result)


def measure(client: Engine, row: _Row) -> _Round:
    """Submit the row's requests together and wait for all. Raises RequestError."""
    chosen = random.Random(0)
    vocabulary = client.ready.vocabulary
    params = SamplingParams(max_tokens=max(1, row.tokens), temperature=0, ignore_eos=True)
    started = time.perf_counter()
    pending = {
        client.submit([chosen.randrange(vocabulary) for _ in range(row.prompt)], params) for _ in range(row.concurrency)
    }
    first_s, first = 0.0, set[int]()
    ring_s = busy_s = 0.0
    while pending:
        event = client.next_event(_WAIT_S)
        if not isinstance(event, Output):
            raise RequestError(f"no token in {_WAIT_S:.0f} s; the model is too slow for this row of the benchmark.")
        if event.error is not None:
            raise RequestError(event.error)
        first.add(event.id)
        if len(first) == row.concurrency and not first_s:
            first_s = time.perf_counter() - started
        if event.finish_reason is not None:
            pending.discard(event.id)
            ring_s, busy_s = ring_s + event.ring_s, busy_s + event.prefill_s + event.decode_s
    total_s = time.perf_counter() - started
    share = ring_s / busy_s if busy_s else 0.0
    if row.test.startswith("pp"):
        return _Round(row.concurrency * row.prompt / total_s, total_s * 1e3, share)
    decode_s = total_s - first_s
    tokens = row.tokens - 1  # the first one comes from the prompt
    return _Round(row.concurrency * tokens / decode_s, decode_s / tokens * 1e3, share)


def summary(client: Engine, backend: str, rounds: dict[_Row, list[_Round]]) -> dict[str, Any]:
    """The JSON object: medians of the rounds."""
    ready = client.ready
    shares = [one.ring_share for row, all in rounds.items() for one in all if row.test.startswith("tg")]
    return {
        "model": ready.model,
        "backend": backend,
        "world_size": ready.world_size,
        "dtype": ready.dtype,
        "quant": ready.quant,
        "rows": [
            {
                "test": row.test,
                "concurrency": row.concurrency,
                "tokens_per_s": statistics.median(one.tokens_per_s for one in all),
                "ms_p50": statistics.median(one.ms for one in all),
                "ms_p90": _ninetieth([one.ms for one in all]),
            }
            for row, all in rounds.items()
        ],
        "comm_share": statistics.median(shares) if shares else 0.0,
        "ranks": [
            {
                "device": rank.device,
                "threads": rank.threads,
                "weights_bytes": rank.weights_bytes,
                "peak_bytes": rank.peak_bytes,
            }
            for rank in ready.ranks
        ],
    }


def _rows(options: BenchOptions) -> list[_Row]:
    try:
        sizes = [int(part) for part in options.concurrency.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1 or len(set(sizes)) < len(sizes):
        raise ConfigError(f"--concurrency {options.concurrency} is not a list of different numbers, such as 1,4,16.")
    if options.prompt < 0 or options.tokens < 0 or options.tokens == 1 or options.repeat < 1:
        raise ConfigError("-p must be 0 or more, -n 0 or 2 and more, and -r 1 or more.")
    rows = list(_wanted(options, sizes))
    if not rows:
        raise ConfigError("-p 0 and -n 0 leave nothing to measure; give one of them.")
    return rows


def _wanted(options: BenchOptions, sizes: list[int]) -> Iterator[_Row]:
    for size in sizes:
        if options.prompt:
            yield _Row(f"pp{options.prompt}", size, options.prompt, 0)
        if options.tokens:
            yield _Row(f"tg{options.tokens}", size, _FIRST, options.tokens)


def _ninetieth(values: list[float]) -> float:
    return sorted(values)[-(-9 * len(values) // 10) - 1]


def _show(result: dict[str, Any]) -> None:
    weights = result["dtype"] if result["quant"] == "none" else result["quant"]
    ranks = "1 rank" if result["world_size"] == 1 else f"{result['world_size']} ranks"
    title = f"{result['model']}, {weights}, {ranks} over {result['backend']}"
    columns = ["test", "requests", "tokens/s", "ms p50", "ms p90"]
    rows = [
        [
            row["test"],
            str(row["concurrency"]),
            f"{row['tokens_per_s']:.1f}",
            f"{row['ms_p50']:.2f}",
            f"{row['ms_p90']:.2f}",
        ]
        for row in result["rows"]
    ]
    console.table(title, columns, rows)
    console.write(f"{result['comm_share']:.0%} of the time of an answer in the ring\n")
    for number, rank in enumerate(result["ranks"]):
        console.write(
            f"rank {number}: {rank['device']}, {rank['threads']} threads, {rank['weights_bytes'] / 1e6:,.0f} MB of "
            f"weights, {rank['peak_bytes'] / 1e6:,.0f} MB resident at most while loading\n"
        )
