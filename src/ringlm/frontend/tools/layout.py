"""Formats declared by patterns, which is all that most take: what stands around names and arguments. Knows no models.

    call = '<call>{json}</call>'                    a JSON object that holds the name and the arguments
    call = '<call>[{json}]</call>'                  a list of them
    call = '<call>{name}<args>{arguments}</call>'   arguments are a JSON object, or with
    argument = '<key>{key}</key><value>{value}</value>'   this pattern for each of them
    calls = '<calls>{calls}</calls>'                around one or more calls

Where {id} stands, a model gives a call some name of its own.
White space between lines and between tags does not count. Of what comes after the arguments, models leave things out;
only of tagged ones the end must come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ringlm.errors import ConfigError
from ringlm.frontend.grammar import Lark, literal
from ringlm.frontend.tools.calls import Calls
from ringlm.frontend.tools.formats import Reasoning, Schemas, ToolFormat
from ringlm.frontend.tools.json_call import json_call, json_calls, read_calls
from ringlm.frontend.tools.reader import Reader, Steps
from ringlm.frontend.tools.tagged import Tags

_PLACE = re.compile(r"\{(?:json|name|id|arguments|key|text|value|calls|reasoning)\}")
_BREAK = re.compile(r"\s*\n\s*|(?<=[>`])(?=<)")


class Layout(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The patterns of a format, and '<think>{reasoning}</think>' where its models reason in another way."""

    call: str
    argument: str = ""
    calls: str = "{calls}"
    reasoning: str = ""


def declared(layout: Layout) -> ToolFormat:
    """The format of that layout. Raises ValueError for a pattern that makes none."""
    found = _Layout(layout)
    marks = Reasoning(*_around(layout.reasoning, "reasoning")) if layout.reasoning else None
    return ToolFormat(
        found.read,
        found.openings,
        found.words(),
        bare=not found.openings,
        write=found.write,
        reasoning=marks,
        head=found.head,
        grammar=found.grammar,
        first=found.first,
    )


def read_layout(path: Path) -> ToolFormat:
    """The format that a file declares, in TOML: the fields of Layout. Raises ConfigError."""
    try:
        return declared(msgspec.toml.decode(path.read_bytes(), type=Layout))
    except OSError as error:
        raise ConfigError(f"--tool-format {path}: cannot be read: {error.strerror}.") from None
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(f"--tool-format {path}: {error}; docs/tools.md shows how a format is declared.") from None


class _Layout:
    """A layout, read and written."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        places = _PLACE.findall(layout.call)
        wanted = [["{json}"], ["{name}", "{arguments}"]]
        if [place for place in places if place != "{id}"] not in wanted:
            raise ValueError(f"{layout.call!r} must have {{name}} and then {{arguments}}, or {{json}}, each once")
        before, *after = _PLACE.split(layout.call)
        self._listed = before.endswith("[") and places == ["{json}"]
        if self._listed:
            before, after = before[:-1], [after[0].removeprefix("]")]
        first, last = _around(layout.calls, "calls")
        self.openings = (*_words(first), *_words(before))
        self._steps = [(place, _words(words)) for place, words in zip(places, after, strict=True)]
        self._last = _words(last)
        # To the letter, as it is enforced:
        self.head, self.first = (first + before).lstrip(), "[{" if places == ["{json}"] else ""
        self._texts = list(zip(places, after, strict=True))
        self._again, self._end = ("\n" if "\n" in first or not first else "") + before, last.rstrip()
        self.tags = _tags(layout.argument) if layout.argument else None
        if self.tags and not self._steps[-1][1]:
            raise ValueError("a call with tagged arguments must end in something")
        if any(place == "{id}" and not words for place, words in self._steps):
            raise ValueError("something must stand after {id}")

    def words(self) -> tuple[str, ...]:
        """Those that come after the openings."""
        inner = [word for _, words in self._steps for word in words]
        return (*inner, *self._last, *(self.tags.words() if self.tags else ()))

    def read(self, reader: Reader, calls: Calls) -> Steps[None]:
        for word in self.openings:
            yield from reader.one_of(word)  # of several the first may be missing
        calls.begin()
        for place, after in self._steps[:-1]:
            if place == "{name}":
                calls.name((yield from reader.expect(*calls.names)))
                yield from reader.in_turn(after)
            else:
                yield from reader.through(after[0], lambda _: None)  # the id is ours to choose
                yield from reader.in_turn(after[1:])
        place, ends = self._steps[-1]
        if place == "{json}":
            yield from read_calls(reader, calls)
        elif self.tags:
            yield from self.tags.read(reader, calls, ends[0])
            ends = ends[1:]
        else:
            yield from reader.object(calls.arguments)
        if place != "{json}":
            calls.end()
        for word in (*ends, *self._last):
            yield from reader.one_of(word)

    def grammar(self, lark: Lark, tools: Schemas, several: bool) -> str:
        """What follows the head."""
        after, end = lark.words(self._texts[-1][1]), lark.words(self._end)
        if self._listed:
            return f'"[" {json_calls(lark, tools, several)} "]" {after} {end}'
        call = f"{lark.rule(' | '.join(self._call_of(lark, *tool) for tool in tools.items()))} {after}"
        return f"{call} ({lark.words(self._again)} {call})* {end}" if several else f"{call} {end}"

    def _call_of(self, lark: Lark, name: str, schema: Mapping[str, Any]) -> str:
        """A call of this tool, without what comes after the arguments."""
        written = []
        for index, (place, text) in enumerate(self._texts):
            if place == "{name}":
                written.append(literal(name))
            elif place == "{id}":
                written.append("/[0-9]{1,3}/")
            elif place == "{json}":
                written.append(json_call(lark, {name: schema}))
            elif self.tags:
                separator = "\n" if self._texts[index - 1][1].endswith("\n") else ""
                written.append(self.tags.grammar(lark, schema, name, separator))
            else:
                written.append(lark.json(schema, f"the parameters of tool {name!r}"))
            if index < len(self._texts) - 1:
                written.append(lark.words(text))
        return " ".join(written)

    def write(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
        """Calls, which are names with arguments, as a model would write them."""
        written = [self._written(name, arguments, str(index)) for index, (name, arguments) in enumerate(calls)]
        if self._listed:
            before, after = _PLACE.split(self._layout.call)
            return before + ", ".join(written) + after
        return _filled(self._layout.calls, calls="\n".join(written))

    def _written(self, name: str, arguments: Mapping[str, Any], index: str) -> str:
        whole = json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        if self._listed:
            return whole
        inside = json.dumps(arguments, ensure_ascii=False)
        if self.tags:
            inside = "\n".join(
                _filled(
                    self._layout.argument,
                    key=key,
                    text=json.dumps(isinstance(value, str)),
                    value=value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
                )
                for key, value in arguments.items()
            )
        return _filled(self._layout.call, json=whole, name=name, arguments=inside, id=index)


def _tags(pattern: str) -> Tags:
    kinds = "{text}" in pattern
    before, middle, *before_value, after = _around(pattern, "key", *(["text"] if kinds else []), "value")
    if not (before.strip() and middle.strip() and after.strip()):
        raise ValueError(f"{pattern!r}: something must stand before {{key}}, between the two, and after {{value}}")
    after_name, *more = *_words(middle), *_words("".join(before_value))
    own_lines = middle.endswith("\n") and after.startswith("\n")
    exact = (before.lstrip(), middle, "".join(before_value), after.rstrip())
    return Tags(before.strip(), after_name, tuple(more), after.strip(), kinds, own_lines, exact)


def _around(pattern: str, *places: str) -> list[str]:
    """What is before, between and after these places."""
    wanted = [f"{{{place}}}" for place in places]
    if _PLACE.findall(pattern) != wanted:
        raise ValueError(f"{pattern!r} must have {', '.join(wanted)}, each once and in this order")
    return _PLACE.split(pattern)


def _filled(pattern: str, **values: str) -> str:
    return _PLACE.sub(lambda place: values[place[0][1:-1]], pattern)


def _words(text: str) -> tuple[str, ...]:
    return tuple(filter(None, _BREAK.split(text.strip())))
