"""The calls in one answer, told as they are read. Knows the names and schemas of the tools, no formats.

A call is told from where it has named one of the tools and its arguments have begun. Until then it may turn out to be
text; from then on what was told stays, and a call that breaks is one that never ends.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from ringlm.frontend.answer import ToolCallDelta
from ringlm.frontend.tools.reader import Broken


def openai_id() -> str:
    return f"call_{secrets.token_hex(12)}"


class Calls:
    """`tools` are JSON schemas by name; `on_tell` is called when a reader need not go back to before this point."""

    def __init__(
        self, tools: Mapping[str, Mapping[str, Any]], new_id: Callable[[], str], on_tell: Callable[[], None]
    ) -> None:
        self.names = tuple(tools)
        self.told = 0
        self.whole = 0
        self._tools = tools
        self._new_id = new_id
        self._on_tell = on_tell
        self._name = ""
        self._arguments = ""  # while they are not told
        self._telling = False
        self._deltas: list[ToolCallDelta] = []

    def begin(self) -> None:
        """Another call is to be read."""
        self._name = self._arguments = ""
        self._telling = False

    def name(self, name: str) -> None:
        """Raises Broken unless it is one of the tools'."""
        if name not in self.names:
            raise Broken
        self._name = name
        self.arguments("")

    def schema(self, argument: str) -> Mapping[str, Any]:
        """What the named tool's schema says of an argument; nothing where it has none."""
        properties = self._tools[self._name].get("properties")
        found = properties.get(argument) if isinstance(properties, Mapping) else None
        return found if isinstance(found, Mapping) else {}

    def arguments(self, text: str) -> None:
        """More of the JSON text of its arguments."""
        self._arguments += text
        if not (self._name and self._arguments):
            return
        if not self._telling:
            self._telling = True
            self._deltas.append(ToolCallDelta(self.told, self._new_id(), self._name))
            self.told += 1
        index = self.told - 1
        if not (self._deltas and self._deltas[-1].index == index):
            self._deltas.append(ToolCallDelta(index))
        last = self._deltas[-1]
        self._deltas[-1] = dataclasses.replace(last, arguments=last.arguments + self._arguments)
        self._arguments = ""
        self._on_tell()

    def end(self) -> None:
        """All of it has been read; a call without arguments has none to tell. Raises Broken if it named no tool."""
        if not self._name:
            raise Broken
        if not self._telling:
            self.arguments("{}")
        self.whole += 1
        self._on_tell()

    def take(self) -> tuple[ToolCallDelta, ...]:
        """What has been told since the last time."""
        deltas, self._deltas = self._deltas, []
        return tuple(deltas)
