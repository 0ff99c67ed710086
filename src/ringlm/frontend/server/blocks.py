"""An answer as blocks in their order: reasoning, text, calls of tools; streamed as they come, or whole. Knows no API's
shape of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ringlm.engine.request import StopReason
from ringlm.frontend.answer import Completion, Piece, ToolCallDelta
from ringlm.frontend.generation import Generation
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.generating import begun, followed, unless_gone
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.sse import EventStream, Write
from ringlm.frontend.server.turns import Turn

Kind = Literal["reasoning", "text", "call"]


@dataclass
class Block:
    """Number `index` of an answer's blocks. A call has an id and a name, and its arguments as text. Where the answer
    ended for its length, its last block is `cut`."""

    index: int
    kind: Kind
    call_id: str = ""
    name: str = ""
    cut: bool = False
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(self.parts)


class Step(NamedTuple):
    """News of a block: it begins, grows by `more`, or ends. One ends before the next begins."""

    what: Literal["begins", "grows", "ends"]
    block: Block
    more: str = ""


class Blocks:
    """Makes blocks of pieces, with no more than `calls` calls of tools."""

    def __init__(self, calls: int | None) -> None:
        self.all: list[Block] = []
        self.reasoning_tokens = 0
        self._calls = calls
        self._open: Block | None = None
        self._call: int | None = None  # whose number the open block is

    def push(self, piece: Piece) -> Iterator[Step]:
        """What a piece brings, the last one the end."""
        told = [call for call in piece.tool_calls if self._calls is None or call.index < self._calls]
        # A call goes on before all else: text after it has ended it.
        going_on = [call for call in told if call.index == self._call]
        for call in going_on:
            yield from self._add("call", call.arguments, call)
        if piece.reasoning:
            yield from self._add("reasoning", piece.reasoning)
            self.reasoning_tokens += piece.reasoning_tokens
        if piece.text:
            yield from self._add("text", piece.text)
        for call in told[len(going_on) :]:
            yield from self._add("call", call.arguments, call)
        if piece.finish_reason is not None:
            yield from self._end(cut=piece.finish_reason == StopReason.LENGTH)

    def _add(self, kind: Kind, more: str, call: ToolCallDelta | None = None) -> Iterator[Step]:
        number = None if call is None else call.index
        block = self._open
        if block is None or (block.kind, self._call) != (kind, number):
            yield from self._end()
            block = self._open = Block(len(self.all), kind)
            if call is not None:
                block.call_id, block.name = call.id or "", call.name or ""
            self._call = number
            self.all.append(block)
            yield Step("begins", block)
        if more:
            block.parts.append(more)
            yield Step("grows", block, more)

    def _end(self, cut: bool = False) -> Iterator[Step]:
        block, self._open, self._call = self._open, None, None
        if block is not None:
            block.cut = cut
            yield Step("ends", block)


class Answer(ABC):
    """The one answer to a turn, on its way to a client, as an API tells it: in events that have a `type`, or whole."""

    def __init__(self, service: Service, request: Request, turn: Turn) -> None:
        self.service = service
        self.blocks = Blocks(turn.calls)
        self.request = request
        self._turn = turn

    async def response(self, stream: bool) -> Response:
        """Raises RingLMError, APIError."""
        if stream:
            return EventStream(self._stream, self.service.awaited, self.failed, named=True)
        return await unless_gone(self.request, self._whole())

    @abstractmethod
    def begins(self, generation: Generation) -> Iterable[msgspec.Struct]:
        """The first events."""

    @abstractmethod
    def step(self, step: Step) -> Iterable[msgspec.Struct]:
        """The events of a step."""

    @abstractmethod
    def ends(self, completion: Completion) -> Iterable[msgspec.Struct]:
        """The last events."""

    @abstractmethod
    def failed(self, error: APIError) -> msgspec.Struct:
        """The last event of a stream that breaks off."""

    @abstractmethod
    def whole(self, completion: Completion) -> msgspec.Struct:
        """The answer, once it has ended."""

    async def _stream(self, write: Write) -> None:
        completion = await self._follow(write)
        for event in self.ends(completion):
            await write(event)

    async def _whole(self) -> Response:
        return encoded(self.whole(await self._follow()))

    async def _follow(self, write: Write | None = None) -> Completion:
        async with begun(self.service, [partial(self._turn.begin, self.service)]) as (each,):
            # Begun with the first piece: what the engine refuses has a status of its own.
            first = [each.generation]

            def events(piece: Piece) -> Iterator[msgspec.Struct]:
                while first:
                    yield from self.begins(first.pop())
                for step in self.blocks.push(piece):
                    yield from self.step(step)

            async def on_piece(piece: Piece) -> None:
                for event in events(piece):
                    if write is not None:
                        await write(event)

            return await followed(self.service, self.request, each, on_piece)
