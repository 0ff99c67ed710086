"""`ringlm bench --url`: a running server under load, whoever made it, in the rows of `ringlm bench`."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import itertools
import statistics
import time
from collections.abc import Sequence
from typing import Any

from ringlm.errors import ConfigError, RingLMError
from ringlm.frontend import console, rows
from ringlm.frontend.endpoint import Answer, Endpoint, Failure, connect, find


@dataclasses.dataclass(frozen=True)
class LoadOptions:
    """The server and its load: `prompt` tokens in, `tokens` out, at each of `concurrency`, `repeat` times after a
    warm-up. `model` None is the server's first."""

    url: str
    api_key: str | None
    model: str | None
    prompt: int
    tokens: int
    concurrency: Sequence[int]
    repeat: int


@dataclasses.dataclass(frozen=True)
class _Round:
    """So many requests at once: what came of them, and how long all took."""

    answers: list[Answer]
    failures: list[Failure]
    seconds: float


def measure(options: LoadOptions) -> dict[str, Any]:
    """The JSON object. Raises ConfigError, and RingLMError when a whole round of requests fails."""
    if options.prompt < 1 or options.tokens < 1:
        raise ConfigError("with --url, -p and -n must be 1 or more.")
    return asyncio.run(_measure(options))


async def _measure(options: LoadOptions) -> dict[str, Any]:
    async with connect(options.url, options.api_key) as client:
        endpoint = await (await find(client, options.model)).sized(options.prompt)
        rounds: dict[int, list[_Round]] = {size: [] for size in options.concurrency}
        busy_s = wall_s = 0.0
        with console.progress("measuring", (options.repeat + 1) * len(rounds)) as advance:
            for turn in range(options.repeat + 1):
                for size, of_size in rounds.items():  # all rows see the same weather
                    cpu_s = time.process_time()
                    measured = await _round(endpoint, size, options.tokens)
                    if turn:
                        of_size.append(measured)
                        busy_s, wall_s = busy_s + time.process_time() - cpu_s, wall_s + measured.seconds
                    advance()
    return {
        "url": options.url,
        "model": endpoint.model,
        "api": endpoint.api,
        "rows": [_row(f"pp{options.prompt}+tg{options.tokens}", size, each) for size, each in rounds.items()],
        "client_share": busy_s / wall_s,  # of one core, for measuring
    }


async def _round(endpoint: Endpoint, size: int, tokens: int) -> _Round:
    began = time.perf_counter()
    results = await asyncio.gather(*(_result(endpoint, tokens) for _ in range(size)))
    seconds = time.perf_counter() - began
    failures = [result for result in results if isinstance(result, Failure)]
    answers = [result for result in results if isinstance(result, Answer)]
    if not answers:
        raise RingLMError(f"of {size} requests at once none succeeded; the last: {failures[-1].kind}, {failures[-1]}.")
    return _Round(answers, failures, seconds)


async def _result(endpoint: Endpoint, tokens: int) -> Answer | Failure:
    try:
        return await endpoint.answer(endpoint.prompt(), tokens)
    except Failure as failure:
        return failure


def _row(test: str, size: int, rounds: list[_Round]) -> dict[str, Any]:
    """`tokens_per_s` are of answers, the prompts' time included; `ms` are those of whole requests."""
    answers = [answer for each in rounds for answer in each.answers]
    gaps = (after - before for answer in answers for before, after in itertools.pairwise(answer.parts))
    return {
        "test": test,
        "concurrency": size,
        "tokens_per_s": statistics.median(sum(one.tokens for one in each.answers) / each.seconds for each in rounds),
        **rows.percentiles("ms", (answer.ended - answer.began for answer in answers)),
        **rows.percentiles("ttft_ms", (answer.first_s for answer in answers)),
        **rows.percentiles("inter_token_ms", gaps),
        "prompt_tokens": statistics.median(answer.prompt_tokens for answer in answers),
        "completion_tokens": statistics.median(answer.tokens for answer in answers),
        "requests": len(answers),
        "errors": dict(collections.Counter(failure.kind for each in rounds for failure in each.failures)),
    }


def show(result: dict[str, Any]) -> None:
    """A table, and what there is to say of errors and of the measuring itself."""
    rows.show(f"{result['model']} at {result['url']}, /{result['api']}", result["rows"])
    for row in result["rows"]:
        for kind, count in row["errors"].items():
            console.write(f"{count} of {row['requests'] + count} requests at {row['concurrency']} failed: {kind}\n")
    first = result["rows"][0]
    console.write(
        f"prompts of {first['prompt_tokens']:.0f} tokens, answers of {first['completion_tokens']:.0f}; "
        f"measuring took {result['client_share']:.0%} of a core\n"
    )
