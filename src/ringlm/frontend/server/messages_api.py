"""/v1/messages: Anthropic's Messages over a conversation's turn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ringlm.engine.request import StopReason
from ringlm.frontend.answer import Completion
from ringlm.frontend.generation import Generation
from ringlm.frontend.server import blocks
from ringlm.frontend.server.access import record
from ringlm.frontend.server.errors import APIError, MessagesErrorResponse
from ringlm.frontend.server.messages_input import turn
from ringlm.frontend.server.messages_schema import (
    Block,
    CountTokensRequest,
    MessageDelta,
    MessageEvent,
    MessageObject,
    MessagesRequest,
    MessagesUsage,
    Stop,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolUseBlock,
)
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.service import Service

SIGNATURE = "ringlm"


async def create_message(request: Request, service: Service) -> Response:
    """Answer a conversation, in the shape of Anthropic's Messages."""
    asked, _ = await service.bodies.read(request, MessagesRequest)
    service.check_model(asked.model)
    sampling = {name: getattr(asked, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
    answer = _Answer(service, request, turn(asked, **sampling, stop=asked.stop_sequences))
    return await answer.response(bool(asked.stream))


async def count_tokens(request: Request, service: Service) -> Response:
    """Count a conversation's tokens, without an answer."""
    asked, _ = await service.bodies.read(request, CountTokensRequest)
    service.check_model(asked.model)
    return encoded(TokenCount(await run_in_threadpool(turn(asked).count, service)))


class _Answer(blocks.Answer):
    def begins(self, generation: Generation) -> Iterator[MessageEvent]:
        usage = _usage(generation.prompt_tokens, generation.cached_tokens, 0)
        yield MessageEvent(type="message_start", message=self._message(content=[], usage=usage))
        yield MessageEvent(type="ping")

    def step(self, step: blocks.Step) -> Iterator[MessageEvent]:
        what, block, more = step
        if what == "begins":
            yield MessageEvent(type="content_block_start", index=block.index, content_block=_begun(block))
        elif what == "grows":
            yield MessageEvent(type="content_block_delta", index=block.index, delta=_delta(block, more))
        else:
            if block.kind == "reasoning":
                signed = MessageDelta(type="signature_delta", signature=SIGNATURE)
                yield MessageEvent(type="content_block_delta", index=block.index, delta=signed)
            yield MessageEvent(type="content_block_stop", index=block.index)

    def ends(self, completion: Completion) -> Iterator[MessageEvent]:
        whole = self.whole(completion)
        delta = MessageDelta(stop_reason=whole.stop_reason, stop_sequence=whole.stop_sequence)
        yield MessageEvent(type="message_delta", delta=delta, usage=whole.usage)
        yield MessageEvent(type="message_stop")

    def failed(self, error: APIError) -> MessagesErrorResponse:
        told = error.body(self.request.url.path)
        assert isinstance(told, MessagesErrorResponse)
        return told

    def whole(self, completion: Completion) -> MessageObject:
        (choice,) = completion.choices
        usage = _usage(completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens)
        reasons: dict[str, Stop] = {StopReason.LENGTH: "max_tokens", StopReason.TOOL_CALLS: "tool_use"}
        usual: Stop = "end_turn" if choice.stop is None else "stop_sequence"
        return self._message(
            content=[_whole(block) for block in self.blocks.all],
            stop_reason=reasons.get(choice.finish_reason, usual),
            stop_sequence=choice.stop,
            usage=usage,
        )

    def _message(self, **fields: Any) -> MessageObject:
        return MessageObject(id=f"msg_{record(self.request).id}", model=self.service.model, **fields)


def _usage(prompt: int, cached: int, output: int) -> MessagesUsage:
    return MessagesUsage(input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=output)


def _begun(block: blocks.Block) -> Block:
    match block.kind:
        case "text":
            return TextBlock(text="")
        case "reasoning":
            return ThinkingBlock(thinking="", signature="")
    return ToolUseBlock(id=block.call_id, name=block.name, input={})


def _delta(block: blocks.Block, more: str) -> MessageDelta:
    match block.kind:
        case "text":
            return MessageDelta(type="text_delta", text=more)
        case "reasoning":
            return MessageDelta(type="thinking_delta", thinking=more)
    return MessageDelta(type="input_json_delta", partial_json=more)


def _whole(block: blocks.Block) -> Block:
    match block.kind:
        case "text":
            return TextBlock(text=block.text)
        case "reasoning":
            return ThinkingBlock(thinking=block.text, signature=SIGNATURE)
    try:
        given = msgspec.json.decode(block.text, type=dict[str, Any])
    except msgspec.DecodeError:
        given = {}
    return ToolUseBlock(id=block.call_id, name=block.name, input=given)
