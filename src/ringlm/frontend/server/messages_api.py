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
from ringlm.frontend.server import messages_schema as schema
from ringlm.frontend.server.access import record
from ringlm.frontend.server.errors import APIError, MessagesErrorResponse
from ringlm.frontend.server.messages_input import turn
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.service import Service

SIGNATURE = "ringlm"


async def create_message(request: Request, service: Service) -> Response:
    """Answer a conversation, in the shape of Anthropic's Messages."""
    asked, _ = await service.read(request, schema.MessagesRequest)
    sampling = {name: getattr(asked, name) for name in ("max_tokens", "temperature", "top_k", "top_p")}
    answer = _Answer(service, request, turn(asked, **sampling, stop=asked.stop_sequences))
    return await answer.response(bool(asked.stream))


async def count_tokens(request: Request, service: Service) -> Response:
    """Count a conversation's tokens, without an answer."""
    asked, _ = await service.read(request, schema.CountTokensRequest)
    return encoded(schema.TokenCount(await run_in_threadpool(turn(asked).count, service)))


class _Answer(blocks.Answer):
    def begins(self, generation: Generation) -> Iterator[schema.MessageEvent]:
        usage = _usage(generation.prompt_tokens, generation.cached_tokens, 0)
        yield schema.MessageEvent(type="message_start", message=self._message(content=[], usage=usage))
        yield schema.MessageEvent(type="ping")

    def step(self, step: blocks.Step) -> Iterator[schema.MessageEvent]:
        what, block, more = step
        if what == "begins":
            yield schema.MessageEvent(type="content_block_start", index=block.index, content_block=_begun(block))
        elif what == "grows":
            yield schema.MessageEvent(type="content_block_delta", index=block.index, delta=_delta(block, more))
        else:
            if block.kind == "reasoning":
                signed = schema.MessageDelta(type="signature_delta", signature=SIGNATURE)
                yield schema.MessageEvent(type="content_block_delta", index=block.index, delta=signed)
            yield schema.MessageEvent(type="content_block_stop", index=block.index)

    def ends(self, completion: Completion) -> Iterator[schema.MessageEvent]:
        whole = self.whole(completion)
        delta = schema.MessageDelta(stop_reason=whole.stop_reason, stop_sequence=whole.stop_sequence)
        yield schema.MessageEvent(type="message_delta", delta=delta, usage=whole.usage)
        yield schema.MessageEvent(type="message_stop")

    def failed(self, error: APIError) -> MessagesErrorResponse:
        told = error.body(self.request.url.path)
        assert isinstance(told, MessagesErrorResponse)
        return told

    def whole(self, completion: Completion) -> schema.MessageObject:
        (choice,) = completion.choices
        usage = _usage(completion.prompt_tokens, completion.cached_tokens, completion.completion_tokens)
        reasons: dict[str, schema.Stop] = {StopReason.LENGTH: "max_tokens", StopReason.TOOL_CALLS: "tool_use"}
        usual: schema.Stop = "end_turn" if choice.stop is None else "stop_sequence"
        return self._message(
            content=[_whole(block) for block in self.blocks.all],
            stop_reason=reasons.get(choice.finish_reason, usual),
            stop_sequence=choice.stop,
            usage=usage,
        )

    def _message(self, **fields: Any) -> schema.MessageObject:
        return schema.MessageObject(id=f"msg_{record(self.request).id}", model=self.service.model, **fields)


def _usage(prompt: int, cached: int, output: int) -> schema.MessagesUsage:
    return schema.MessagesUsage(input_tokens=prompt - cached, cache_read_input_tokens=cached, output_tokens=output)


def _begun(block: blocks.Block) -> schema.Block:
    match block.kind:
        case "text":
            return schema.TextBlock(text="")
        case "reasoning":
            return schema.ThinkingBlock(thinking="", signature="")
    return schema.ToolUseBlock(id=block.call_id, name=block.name, input={})


def _delta(block: blocks.Block, more: str) -> schema.MessageDelta:
    match block.kind:
        case "text":
            return schema.MessageDelta(type="text_delta", text=more)
        case "reasoning":
            return schema.MessageDelta(type="thinking_delta", thinking=more)
    return schema.MessageDelta(type="input_json_delta", partial_json=more)


def _whole(block: blocks.Block) -> schema.Block:
    match block.kind:
        case "text":
            return schema.TextBlock(text=block.text)
        case "reasoning":
            return schema.ThinkingBlock(thinking=block.text, signature=SIGNATURE)
    try:
        given = msgspec.json.decode(block.text, type=dict[str, Any])
    except msgspec.DecodeError:
        given = {}
    return schema.ToolUseBlock(id=block.call_id, name=block.name, input=given)
