"""What is made of the JSON Schema Test Suite: how many schemas are enforced, and whether just the valid values can be
written as answers.

    git clone https://github.com/json-schema-org/JSON-Schema-Test-Suite
    python benchmarks/schema_suite.py JSON-Schema-Test-Suite [draft2020-12 …]

No model is needed. `wrong` values are invalid and could be written; they are shown. `unwritten` ones are valid and
cannot be.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from ringlm.errors import RequestError
from ringlm.frontend.grammar import Lark

DRAFTS = ["draft2020-12", "draft2019-09", "draft7", "draft4"]
BYTES = LLTokenizer("byte")


def matcher(schema: Any) -> LLMatcher | None:
    """What tells whether a text may be an answer; None where the schema is refused."""
    lark = Lark({})
    try:
        made = LLMatcher(BYTES, lark.text(lark.json(schema, "it")), log_level=0)
    except RequestError:
        return None
    return None if made.is_error() else made


def texts(value: Any) -> Iterator[str]:
    """The value as JSON, its keys in any order: an answer has them in that of the schema."""
    orders = [value]
    if isinstance(value, dict) and len(value) < 5:
        orders = [dict(order) for order in itertools.permutations(value.items())]
    for order in orders:
        yield json.dumps(order, ensure_ascii=False)


def accepts(made: LLMatcher, text: str) -> bool:
    made.reset()
    data = list(text.encode(errors="surrogatepass"))
    return bool(made.try_consume_tokens(data) == len(data) and made.is_accepting())


def main() -> int:
    folder, *drafts = sys.argv[1:] or [None]
    if folder is None:
        print(__doc__, file=sys.stderr)
        return 2
    for draft in drafts or DRAFTS:
        counts: Counter[str] = Counter()
        for path in sorted((Path(folder) / "tests" / draft).rglob("*.json")):
            for case in json.loads(path.read_text()):
                made = matcher(case["schema"])
                counts["schemas"] += 1
                counts["enforced"] += made is not None
                for test in case["tests"] if made is not None else ():
                    written = any(accepts(made, text) for text in texts(test["data"]))
                    kind = "right" if written == test["valid"] else "wrong" if written else "unwritten"
                    counts[kind] += 1
                    if kind == "wrong":
                        print(f"{draft} {path.stem}: {test['description']}: {test['data']!r:.60} of {case['schema']}")
        print(json.dumps({"draft": draft, **counts}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
