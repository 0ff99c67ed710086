"""What a grammar costs a decode step: milliseconds a token of one stream, free and following grammars, by turns.

    python benchmarks/grammar.py [-m demo] [--quant int4] [--ranks 2] [--rounds 5] [--tokens 128] [--json]

All go on from the same prompt for as many tokens, so that the model's part is the same. `before` is free text in an
engine that has not compiled a grammar yet; the others come after that, so it shows what those cost who ask for none.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="demo")
    parser.add_argument("--quant", default="int4")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    times: dict[str, list[float]] = {}
    with LLM(options.model, quant=options.quant, tensor_parallel=options.ranks) as llm:

        def ask(name: str, temperature: float) -> None:
            params: dict[str, Any] = {"temperature": temperature, "seed": 1, "structured_outputs": SHAPES.get(name)}
            sampling = SamplingParams(max_tokens=options.tokens, min_tokens=options.tokens, **params)
            (answer,) = llm.generate(["A list of animals: "], sampling)
            if answer.completion_tokens > options.tokens // 2:  # a grammar may end it sooner
                kind = "greedy" if temperature == 0 else "sampled"
                times.setdefault(f"{name}, {kind}", []).append(1000 / answer.tokens_per_s)

        for _ in range(2):
            ask("free", 0.0)  # compiles kernels
        times.clear()
        for _ in range(options.rounds):
            ask("before", 0.0)
        for _ in range(options.rounds):
            for temperature in (0.0, 1.0):
                for name in SHAPES:
                    ask(name, temperature)
    medians = {name: statistics.median(each) for name, each in times.items()}
    for name, ms in medians.items():
        free = medians[f"free, {name.rpartition(', ')[2]}"]
        if options.json:
            print(json.dumps({"kind": name, "ms_per_token": round(ms, 3), "of_free": round(ms / free, 3)}))
        else:
            print(f"{name:22} {ms:7.2f} ms a token, {ms / free:.2f} of free")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
