"""What a grammar costs a decode step: milliseconds a token of one stream, free and following grammars, by turns.

    python benchmarks/grammar.py [-m demo] [--quant int4] [--ranks 2] [--rounds 5] [--tokens 128] [--json]

All go on from the same prompt for as many tokens, so that the model's part is the same. `before` is free text in an
engine that has not compiled a grammar yet; the others come after that, so it shows what those cost who ask for none.
Beside wall time stands the time on processors, of all threads and ranks, which others that use the machine change less.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any, NamedTuple

import psutil

from ringlm import LLM, SamplingParams, StructuredOutputsParams

_ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 3, "maxLength": 30},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "kind": {"enum": ["cat", "dog", "bird"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}
SHAPES: dict[str, StructuredOutputsParams | None] = {
    "free": None,
    "schema": StructuredOutputsParams(json={"type": "array", "items": _ITEM, "minItems": 99}),
    "any JSON": StructuredOutputsParams(json={"type": "array", "minItems": 99}),
    "expression": StructuredOutputsParams(regex=r"([A-Z][a-z]+ [a-z ]+[.!?] )*"),
}


def used_s() -> float:
    """What the engine's processes have spent on processors."""
    times = [process.cpu_times() for process in psutil.Process().children(recursive=True)]
    return sum(time.user + time.system for time in times)


class Times(NamedTuple):
    """A median of milliseconds a token, and how many times that of free text it is."""

    ms: float
    of_free: float

    @classmethod
    def of(cls, values: list[float], free: list[float]) -> Times:
        median = statistics.median(values)
        return cls(round(median, 3), round(median / statistics.median(free), 3))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    times: dict[str, list[tuple[float, float]]] = {}
    with LLM(options.model, quant=options.quant, tensor_parallel=options.ranks) as llm:

        def ask(name: str, temperature: float) -> None:
            params: dict[str, Any] = {"temperature": temperature, "seed": 1, "structured_outputs": SHAPES.get(name)}
            sampling = SamplingParams(max_tokens=options.tokens, min_tokens=options.tokens, **params)
            before_s = used_s()
            (answer,) = llm.generate(["A list of animals: "], sampling)
            used_ms = (used_s() - before_s) * 1000 / answer.completion_tokens
            if answer.completion_tokens > options.tokens // 2:  # a grammar may end it sooner
                kind = "greedy" if temperature == 0 else "sampled"
                times.setdefault(f"{name}, {kind}", []).append((1000 / answer.tokens_per_s, used_ms))

        for _ in range(2):
            ask("free", 0.0)  # compiles kernels
        times.clear()
        for _ in range(options.rounds):
            ask("before", 0.0)
            ask("before", 1.0)
        for _ in range(options.rounds):
            for temperature in (0.0, 1.0):
                for name in SHAPES:
                    ask(name, temperature)
    for name, each in times.items():
        free = times[f"free, {name.rpartition(', ')[2]}"]
        wall, used = (Times.of([row[i] for row in each], [row[i] for row in free]) for i in (0, 1))
        if options.json:
            print(json.dumps({"kind": name, "wall": wall._asdict(), "processors": used._asdict()}))
        else:
            shown = (f"{one.ms:7.2f} ms a token, {one.of_free:.2f} of free" for one in (wall, used))
            print(f"{name:22}", "; on processors ".join(shown))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
