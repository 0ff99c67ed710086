"""Formats declared by patterns, which is all that most take: what stands around names and arguments. Knows no models.

    call = '<call>{json}</call>'                    a JSON object that holds the name and the arguments
    call = '<call>[{json}]</call>'                  a list of them
    call = '<call>{name}<args>{arguments}</call>'   arguments are a JSON object, or with
    argument = '<key>{key}</key><value>{value}</value>'   this pattern for each of them
    calls = '<calls>{calls}</calls>'                around one or more calls

White space between lines and between tags does not count. Of what comes after the arguments, models leave things out;
only of tagged ones the end must come.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from ringlm.errors import ConfigError
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Reasoning, ToolFormat
from ringlm.frontend.tools.json_call import read_calls
from ringlm.frontend.tools.reader import Reader, Steps
from ringlm.frontend.tools.tagged import Tags

_PLACE = re.compile(r"\{(?:json|name|arguments|key|text|value|calls|reasoning)\}")
_BREAK = re.compile(r"\s*\n\s*|(?<=[>`])(?=<)")


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The patterns of a format, and '<think>{reasoning}</think>' where its models reason in another way."""

    call: str
    argument: str = ""
    calls: str = "{calls}"
    reasoning: str = ""


def declared(layout: Layout) -> ToolFormat:
    """The format of that layout. Raises ValueError for a pattern that makes none."""
    reads = _Layout(layout)
    words = (*reads.between, *reads.ends, *(reads.tags.words() if reads.tags else ()))
    marks = Reasoning(*_around(layout.reasoning, "reasoning")) if layout.reasoning else None
    return ToolFormat(reads.read, reads.openings, inner=words, bare=not reads.openings, reasoning=marks)


def read_layout(path: Path) -> ToolFormat:
    """The format that a file declares, in TOML: the fields of Layout. Raises ConfigError."""
    try:
        return declared(msgspec.toml.decode(path.read_bytes(), type=Layout))
    except OSError as error:
        raise ConfigError(f"--tool-format {path}: cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"--tool-format {path}: {error}; docs/tools.md shows how a format is declared.") from None


class _Layout:
    """A layout, read."""

    def __init__(self, layout: Layout) -> None:
        self._holds_name = "{json}" in layout.call
        if self._holds_name:
            before, after = _around(layout.call, "json")
            before, between, after = before.removesuffix("["), "", after.removeprefix("]")
        else:
            before, between, after = _around(layout.call, "name", "arguments")
        first, last = _around(layout.calls, "calls")
        self.openings = (*_words(first), *_words(before))
        self.between = _words(between)
        self.ends = (*_words(after), *_words(last))
        self.tags = _tags(layout.argument) if layout.argument else None
        if self.tags and not _words(after):
            raise ValueError("a call with tagged arguments must end in something")

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        for word in self.openings:
            yield from reader.one_of(word)  # of several the first may be missing
        if self._holds_name:
            yield from read_calls(reader, calls)
        else:
            yield from self._read_named(reader, calls)
        for word in self.ends[1 if self.tags else 0 :]:
            yield from reader.one_of(word)

    def _read_named(self, reader: Reader, calls: Calls) -> Steps[None]:
        calls.begin()
        calls.name((yield from reader.expect(*calls.names)))
        for word in self.between:
            yield from reader.expect(word)
        if self.tags:
            yield from self.tags.read(reader, calls, self.ends[0])
        else:
            yield from reader.object(calls.arguments)
        calls.end()


def _tags(pattern: str) -> Tags:
    kinds = "{text}" in pattern
    before, middle, *before_value, after = _around(pattern, "key", *(["text"] if kinds else []), "value")
    if not (before.strip() and middle.strip() and after.strip()):
        raise ValueError(f"{pattern!r}: something must stand before {{key}}, between the two, and after {{value}}")
    after_name, *more = *_words(middle), *_words("".join(before_value))
    own_lines = middle.endswith("\n") and after.startswith("\n")
    return Tags(before.strip(), after_name, tuple(more), after.strip(), kinds, own_lines)


def _around(pattern: str, *places: str) -> list[str]:
    """What is before, between and after these places."""
    wanted = [f"{{{place}}}" for place in places]
    if _PLACE.findall(pattern) != wanted:
        raise ValueError(f"{pattern!r} must have {', '.join(wanted)}, each once and in this order")
    return _PLACE.split(pattern)


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, _BREAK.split(text.strip())))
