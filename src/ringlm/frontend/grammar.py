"""What an answer may be, as a grammar that the engine reads: llguidance's Lark, with JSON schemas in it. Knows text and
which words are special tokens; neither models nor how calls of tools are written.

An answer is what the model reasons, if it does, and then what was asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import msgspec

from ringlm.engine.request import StructuredOutputsParams
from ringlm.errors import RequestError
from ringlm.frontend.json_schema import enforceable

if TYPE_CHECKING:
    from ringlm.frontend.tools.formats import Reasoning

MAX_CHARACTERS: Final = 1 << 18
# One space, or a line break and what indents the next line; models left alone with it fill answers with white space.
_JSON_SPACE: Final = r" |\n[ \t]{0,40}"


class Lark:
    """A grammar as it is written. `special` are ids of the model's special tokens by name; no text stands for those."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        longest_first = sorted(special, key=len, reverse=True)
        self._names = re.compile(f"({'|'.join(map(re.escape, longest_first))})") if special else None
        self._lines = ['%llguidance {"no_forcing": true}', "TEXT: /(.|\\n)*/", "GAP: /[ \\n]{1,2}/"]
        self._others: list[dict[str, str]] = []

    def is_special(self, word: str) -> bool:
        """Whether the model has a special token of this name."""
        return word in self._special

    def words(self, words: str) -> str:
        """Just these words of the model's format, some of which may be special tokens."""
        return " ".join(self._parts(words))

    def until(self, words: str, text: str = "TEXT") -> str:
        """Any text, or that of another terminal, up to the first of `words` in it, and all of them."""
        first, *others = self._parts(words)
        ended = f"{text} {first}" if first.startswith("<") else self.rule(f"{text} {first}", "[lazy]")
        return " ".join([ended, *others])

    def rule(self, body: str, attributes: str = "", name: str = "rule") -> str:
        """The name of a new rule; a terminal is one in capitals."""
        name = f"{name}_{len(self._lines)}"
        self._lines.append(f"{name}{attributes}: {body}")
        return name

    def json(self, schema: Mapping[str, Any] | bool, what: str) -> str:
        """A JSON text of `schema`. Raises RequestError that names `what` for a schema that cannot be enforced."""
        options = {"x-guidance": {"whitespace_pattern": _JSON_SPACE}}
        return self.rule(f"%json {json.dumps(enforceable(schema, what) | options)}")

    def other(self, grammar: str) -> str:
        """All of another grammar in Lark."""
        name = f"other_{len(self._others)}"
        self._others.append({"name": name, "lark_grammar": grammar})
        return f"@{name}"

    def _parts(self, words: str) -> list[str]:
        parts = [words] if self._names is None else self._names.split(words)
        return [f"<[{self._special[part]}]>" if part in self._special else literal(part) for part in parts if part]

    def text(self, start: str) -> str:
        """The whole, which begins with `start`. Raises RequestError for one that is too long."""
        lark = "\n".join([*self._lines, f"start: {start}"])
        whole = json.dumps({"grammars": [{"lark_grammar": lark}, *self._others]})
        if len(whole) > MAX_CHARACTERS:
            raise RequestError(
                f"what describes the shape of the answer has {len(whole):,} characters; at most {MAX_CHARACTERS:,} are "
                "supported."
            )
        return whole


def literal(text: str) -> str:
    """Just this text, in Lark."""
    return json.dumps(text, ensure_ascii=False)


def shaped(asked: StructuredOutputsParams, lark: Lark) -> str:
    """What `asked` describes. Raises RequestError."""
    if asked.json is not None:
        return lark.json(_parsed(asked.json), "the JSON schema")
    if asked.json_object:
        return lark.json({"type": "object"}, "")
    if asked.choice is not None:
        return lark.rule(" | ".join(map(literal, asked.choice)))
    if asked.regex is not None:
        return lark.rule(_between_slashes(asked.regex) if asked.regex else '""')
    return lark.other(asked.grammar or "")


def after_reasoning(lark: Lark, marks: Reasoning | None, opened: bool, then: str) -> str:
    """`then`, after what a model writes between `marks`, if it does; it must, where its prompt has `opened` them."""
    if marks is None:
        return then
    if opened:
        return f"{lark.until(marks.closing)} GAP? {then}"
    return f"({lark.words(marks.opening)} {lark.until(marks.closing)} GAP?)? {then}"


def _parsed(schema: Mapping[str, Any] | str | bool) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return msgspec.json.decode(schema)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        raise RequestError(f"the JSON schema is no JSON: {error}.") from None


def _between_slashes(regex: str) -> str:
    """A regular expression as Lark has it, whose slashes are escaped."""
    return "/" + re.sub(r"(\\.)|/", lambda found: found[1] or "\\/", regex, flags=re.DOTALL) + "/"
