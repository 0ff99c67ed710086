"""`ringlm bench`: tokens per second of prompts and of answers, in llama-bench's words. Token ids only: it needs no
tokenizer, and random weights will do. With `--url` it measures a server instead (frontend/load.py)."""

from __future__ import annotations

import dataclasses
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import msgspec

from ringlm.cluster.messages import Output
from ringlm.engine.request import SamplingParams
from ringlm.errors import ConfigError, RequestError
from ringlm.frontend import console, plot, rows
from ringlm.frontend.command_options import BenchOptions
from ringlm.frontend.options import EngineOptions
from ringlm.frontend.progress import StartUp
from ringlm.frontend.switchboard import Engine

_FIRST = 4  # tokens of the prompt before a tg row
_WAIT_S = 600.0  # for news of any request


@dataclasses.dataclass(frozen=True)
class _Row:
    """One line of the result: requests of `prompt` tokens that are answered with `tokens`."""

    test: str
    concurrency: int
    prompt: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class _Round:
    """What one round of a row gave: `seconds` a prompt, or a token of an answer; for each request the time to its first
    token, and the times between the others."""

    tokens_per_s: float
    seconds: float
    ring_share: float
    first_s: list[float]
    gaps_s: list[float]


def bench(engine: EngineOptions, options: BenchOptions) -> None:
    """The whole command. On a daemon it does not return; its process becomes the engine's."""
    if options.repeat < 1:
        raise ConfigError("-r must be 1 or more.")
    if options.url is None:
        _tell(_measure(engine, options), _show, options)
        return
    from ringlm.frontend import load

    if dataclasses.replace(engine, model=None) != EngineOptions():
        raise ConfigError(
            "--url measures a server that runs already; of the options of engine and ring it takes -m alone."
        )
    if options.plot is not None:
        plot.check(options.plot)  # better now than after minutes
    server = load.LoadOptions(
        url=options.url,
        api_key=options.api_key,
        model=engine.model,
        prompt=options.prompt,
        tokens=options.tokens,
        concurrency=rows.sizes(options.concurrency),
        repeat=options.repeat,
    )
    _tell(load.measure(server), load.show, options)


def _tell(result: dict[str, Any], show: Callable[[dict[str, Any]], None], options: BenchOptions) -> None:
    if options.plot is not None:
        plot.draw_load(result["rows"], result["model"], options.plot)
    if options.json:
        import json

        print(json.dumps(result), flush=True)
    else:
        show(result)


def _measure(engine: EngineOptions, options: BenchOptions) -> dict[str, Any]:
    wanted = _rows(options)
    largest = max(row.concurrency for row in wanted)
    if engine.max_seqs is not None and engine.max_seqs < largest:
        raise ConfigError(f"--max-seqs {engine.max_seqs} is less than the concurrency of {largest}; leave it out.")
    longest = max(row.prompt + row.tokens for row in wanted)
    engine = dataclasses.replace(engine, max_seqs=largest, context=engine.context or longest)
    _, spec = engine.resolve()
    from ringlm.cluster.client import EngineClient, serve_rank

    if spec.ring is not None and spec.ring.rank != 0:
        serve_rank(spec)
    if options.plot is not None:
        plot.check(options.plot)
    with StartUp() as progress:
        client = EngineClient.start(spec, progress.show)
    with client:
        if client.ready.context < longest:
            raise ConfigError(f"--context {client.ready.context} is less than the {longest} tokens of a row.")
        rounds: dict[_Row, list[_Round]] = {row: [] for row in wanted}
        with console.progress("measuring", (options.repeat + 1) * len(wanted)) as advance:
            for turn in range(options.repeat + 1):
                for row in wanted:  # all rows see the same weather
                    measured = measure(client, row)
                    if turn:
                        rounds[row].append(measured)
                    advance()
        return summary(client, spec.settings.backend, rounds)


def measure(client: Engine, row: _Row) -> _Round:
    """Submit the row's requests together and wait for all. Raises RequestError."""
    vocabulary = client.ready.vocabulary
    params = SamplingParams(max_tokens=max(1, row.tokens), temperature=0, ignore_eos=True)
    started = time.perf_counter()
    pending = {
        # Other tokens every time: nothing of them is in a prefix cache.
        client.submit([random.randrange(vocabulary) for _ in range(row.prompt)], params)
        for _ in range(row.concurrency)
    }
    newest: dict[int, float] = {}  # when each request had its newest token
    first_s, gaps_s = list[float](), list[float]()
    ring_s = busy_s = 0.0
    while pending:
        event = client.next_event(_WAIT_S)
        if not isinstance(event, Output):
            raise RequestError(f"no token in {_WAIT_S:.0f} s; the model is too slow for this row of the benchmark.")
        if event.error is not None:
            raise RequestError(event.error)
        now, count = time.perf_counter(), len(event.tokens)
        if event.id in newest:
            gaps_s += [(now - newest[event.id]) / max(1, count)] * count
        else:
            first_s.append(now - started)
        newest[event.id] = now
        if event.finish_reason is not None:
            pending.discard(event.id)
            ring_s, busy_s = ring_s + event.ring_s, busy_s + event.prefill_s + event.decode_s
    total_s = time.perf_counter() - started
    share = ring_s / busy_s if busy_s else 0.0
    if row.test.startswith("pp"):
        return _Round(row.concurrency * row.prompt / total_s, total_s, share, first_s, gaps_s)
    decode_s = total_s - max(first_s)
    tokens = row.tokens - 1  # the first one comes from the prompt
    return _Round(row.concurrency * tokens / decode_s, decode_s / tokens, share, first_s, gaps_s)


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
                **rows.percentiles("ms", (one.seconds for one in all)),
                **rows.percentiles("ttft_ms", (time_s for one in all for time_s in one.first_s)),
                **rows.percentiles("inter_token_ms", (time_s for one in all for time_s in one.gaps_s)),
            }
            for row, all in rounds.items()
        ],
        "comm_share": statistics.median(shares) if shares else 0.0,
        "ranks": msgspec.to_builtins(ready.ranks),
    }


def _rows(options: BenchOptions) -> list[_Row]:
    numbers = rows.sizes(options.concurrency)
    if options.prompt < 0 or options.tokens < 0 or options.tokens == 1:
        raise ConfigError("-p must be 0 or more, and -n 0 or 2 and more.")
    kinds = (  # how many tokens were asked for, the row's name, its prompt and answer
        (options.prompt, f"pp{options.prompt}", options.prompt, 0),
        (options.tokens, f"tg{options.tokens}", _FIRST, options.tokens),
    )
    wanted = [_Row(test, size, prompt, tokens) for size in numbers for asked, test, prompt, tokens in kinds if asked]
    if not wanted:
        raise ConfigError("-p 0 and -n 0 leave nothing to measure; give one of them.")
    return wanted


def _show(result: dict[str, Any]) -> None:
    weights = result["dtype"] if result["quant"] == "none" else result["quant"]
    ranks = "1 rank" if result["world_size"] == 1 else f"{result['world_size']} ranks"
    rows.show(f"{result['model']}, {weights}, {ranks} over {result['backend']}", result["rows"])
    console.write(f"{result['comm_share']:.0%} of the time of an answer in the ring\n")
    for number, rank in enumerate(result["ranks"]):
        console.write(
            f"rank {number}: {rank['device']}, {rank['threads']} threads, {rank['weights_bytes'] / 1e6:,.0f} MB of "
            f"weights, {rank['peak_bytes'] / 1e6:,.0f} MB resident at most while loading\n"
        )
