"""Random JSON schemas, of the kinds that public suites have, and answers of the demo model that follow them.

    python benchmarks/schemas.py --count 300

For each a conversation is asked for JSON of the schema at temperature 1; every answer that has ended by itself must
validate. Prints one line of figures, and each answer that does not, if any.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

_WORDS = ["name", "age", "city", "tags", "score", "items", "owner", "size", "color", "note", "parent", "unit", "kind"]
_PATTERNS = ["^[A-Z]{2}-[0-9]{3}$", "^(red|green|blue)+$", "[0-9]{4}", "^\\w+@\\w+\\.com$", "^[a-f0-9]{8}$", "^a.c$"]
_FORMATS = ["date", "time", "date-time", "email", "ipv4", "ipv6", "uuid", "uri", "hostname", "duration"]


def make(seed: int) -> Schema:
    """Number `seed` of the schemas, an object's."""
    maker = _Maker(random.Random(seed))
    schema = maker.object(0)
    return {
        "$schema": Draft202012Validator.META_SCHEMA["$id"],
        **schema,
        **({"$defs": maker.defs} if maker.defs else {}),
    }


class _Maker:
    """Draws schemas; what is named goes to `defs`."""

    def __init__(self, draw: random.Random) -> None:
        self._draw = draw
        self.defs: dict[str, Any] = {}

    def any(self, depth: int) -> Schema:
        flat: list[Callable[[int], Schema]] = [
            *(self.string, self.string, self.number, self.integer, self.boolean, self.enum, self.const),
            *(self.nullable, self.typed),
        ]
        deep = [self.object, self.array, self.tuple, self.any_of, self.all_of, self.one_of, self.ref, self.map]
        return self._draw.choice(flat + deep * 2 if depth < 3 else flat)(depth + 1)

    def object(self, depth: int) -> Schema:
        names = self._draw.sample(_WORDS, self._draw.randint(1, 4))
        schema: Schema = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        schema["required"] = [name for name in names if self._draw.random() < 0.7]
        more = self._draw.random()
        if more < 0.8:
            schema["additionalProperties"] = False
        elif more < 0.9:
            schema |= {"additionalProperties": self.integer(depth), "required": names, "maxProperties": len(names) + 2}
        return schema

    def map(self, depth: int) -> Schema:
        value = self.any(depth)
        if self._draw.random() < 0.5:
            return {"type": "object", "patternProperties": {"^[a-z]{1,4}$": value}, "additionalProperties": False} | {
                "maxProperties": 3
            }
        return {"type": "object", "additionalProperties": value, "minProperties": 1, "maxProperties": 3}

    def array(self, depth: int) -> Schema:
        low = self._draw.randint(0, 2)
        return {"type": "array", "items": self.any(depth), "minItems": low, "maxItems": low + self._draw.randint(1, 2)}

    def tuple(self, depth: int) -> Schema:
        items = [self.any(depth) for _ in range(self._draw.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": len(items)}

    def any_of(self, depth: int) -> Schema:
        return {"anyOf": [self.any(depth) for _ in range(self._draw.randint(2, 3))]}

    def one_of(self, depth: int) -> Schema:
        """Told apart by a constant, as tagged unions are."""
        kinds = self._draw.sample(_WORDS, 2)
        return {
            "oneOf": [
                {
                    "type": "object",
                    "properties": {"type": {"const": kind}, "value": self.any(depth)},
                    "required": ["type", "value"],
                    "additionalProperties": False,
                }
                for kind in kinds
            ]
        }

    def all_of(self, depth: int) -> Schema:
        first, second = self._draw.sample(_WORDS, 2)
        parts = [
            {"type": "object", "properties": {name: self.any(depth)}, "required": [name]} for name in (first, second)
        ]
        return {"allOf": parts, "maxProperties": 2} if self._draw.random() < 0.3 else {"allOf": parts}

    def ref(self, depth: int) -> Schema:
        name = f"def{self._draw.randint(0, 2)}"
        if name not in self.defs:
            self.defs[name] = True  # what refers to itself
            self.defs[name] = self.object(depth)
        elif self.defs[name] is True:
            return {"anyOf": [{"type": "null"}, {"$ref": f"#/$defs/{name}"}]}
        return {"$ref": f"#/$defs/{name}"}

    def string(self, depth: int) -> Schema:
        kind = self._draw.random()
        if kind < 0.25:
            return {"type": "string", "pattern": self._draw.choice(_PATTERNS), "maxLength": 40}
        if kind < 0.5:
            return {"type": "string", "format": self._draw.choice(_FORMATS)}
        low = self._draw.randint(0, 5)
        return {"type": "string", "minLength": low, "maxLength": low + self._draw.randint(0, 20)}

    def integer(self, depth: int) -> Schema:
        low = self._draw.randint(-1000, 1000)
        schema: Schema = {"type": "integer"}
        schema[self._draw.choice(["minimum", "exclusiveMinimum"])] = low
        schema[self._draw.choice(["maximum", "exclusiveMaximum"])] = low + self._draw.randint(10, 5000)
        if self._draw.random() < 0.2:
            schema["multipleOf"] = self._draw.choice([2, 3, 5, 7])
        return schema

    def number(self, depth: int) -> Schema:
        low = round(self._draw.uniform(-100, 100), 2)
        return {"type": "number", "minimum": low, "exclusiveMaximum": low + self._draw.choice([0.5, 3.25, 1000.0])}

    def boolean(self, depth: int) -> Schema:
        return {"type": "boolean"}

    def typed(self, depth: int) -> Schema:
        return {"type": self._draw.sample(["boolean", "null", "integer"], 2)}

    def nullable(self, depth: int) -> Schema:
        return {"anyOf": [self.string(depth), {"type": "null"}]}

    def enum(self, depth: int) -> Schema:
        values: list[Any] = ["red", "grün", 'a "quote"', 0, 1.5, None, True, [1, "x"], {"a": 1}]
        return {"enum": self._draw.sample(values, self._draw.randint(1, 5))}

    def const(self, depth: int) -> Schema:
        return {"const": self._draw.choice(["fixed", 7, False, None, ["a", 1]])}


def validator(schema: Schema) -> Draft202012Validator:
    """What judges an answer, formats included as far as it knows them."""
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--ranks", type=int, default=1)
    arguments = parser.parse_args()
    from ringlm import LLM, SamplingParams, StructuredOutputsParams

    schemas = [make(arguments.first + index) for index in range(arguments.count)]
    prompts = [f"A JSON value of the schema {json.dumps(schema)[:600]}:\n\n" for schema in schemas]
    params = [
        SamplingParams(
            seed=seed, max_tokens=arguments.max_tokens, structured_outputs=StructuredOutputsParams(json=schema)
        )
        for seed, schema in enumerate(schemas)
    ]
    with LLM("demo", quant="int4", tensor_parallel=arguments.ranks) as llm:
        began = time.monotonic()
        answers = llm.generate(prompts, params)
    ends = Counter(answer.finish_reason for answer in answers)
    wrong = 0
    for number, (schema, answer) in enumerate(zip(schemas, answers, strict=True), arguments.first):
        errors = validator(schema).iter_errors(json.loads(answer.text)) if answer.finish_reason == "stop" else ()
        for error in errors:
            wrong += 1
            print(f"{number}: {error.message} in {answer.text}")
    tokens = sum(answer.completion_tokens for answer in answers)
    print(json.dumps({**ends, "invalid": wrong, "tokens": tokens, "seconds": round(time.monotonic() - began)}))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
