"""/v1/responses: OpenAI's Responses over a conversation's turn; answers kept for those who go on from them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import UNSET
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from ringlm.engine.request import StopReason
from ringlm.frontend.answer import Completion
from ringlm.frontend.generation import Generation
from ringlm.frontend.server import responses_schema as schema
from ringlm.frontend.server.blocks import Answer, Block, Step
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.responses_input import Offered, offered, turn
from ringlm.frontend.server.responses_store import Kept
from ringlm.frontend.server.service import Service
from ringlm.frontend.server.turns import Turn


async def create_response(request: Request, service: Service) -> Response:
    """Answer a conversation, in the shape of OpenAI's Responses."""
    asked, fields = await service.read(request, schema.ResponsesRequest)
    if asked.background:
        raise APIError(400, "background is not supported: stay connected, or stream.", param="background")
    items, tools = _items(asked, service), offered(asked.tools)
    more = {"max_completion_tokens": asked.max_output_tokens, "temperature": asked.temperature, "top_p": asked.top_p}
    answer = _Answer(service, request, turn(asked, items, tools, **more), asked, fields, items, tools)
    return await answer.response(bool(asked.stream))


async def count_input_tokens(request: Request, service: Service) -> Response:
    """Count a conversation's tokens, without an answer."""
    asked, _ = await service.read(request, schema.InputRequest)
    counted = turn(asked, _items(asked, service), offered(asked.tools))
    return encoded(schema.InputTokens(input_tokens=await run_in_threadpool(counted.count, service)))


async def retrieve_response(request: Request, service: Service) -> Response:
    """An answer that is kept."""
    kept = service.kept.find(request.path_params["id"])
    if kept is None:
        raise _not_kept(request.path_params["id"])
    return Response(kept.response, media_type="application/json")


async def delete_response(request: Request, service: Service) -> Response:
    """Keep an answer no longer."""
    name = request.path_params["id"]
    if not service.kept.drop(name):
        raise _not_kept(name)
    return encoded(schema.Deleted(id=name))


def _not_kept(name: str) -> APIError:
    return APIError(404, f"the response '{name:.128}' is not kept here, or no longer.")


def _items(asked: schema.InputRequest, service: Service) -> list[schema.InputItem]:
    """All that the model is to see, but the instructions."""
    items = [schema.InputItem(role="user", content=asked.input)] if isinstance(asked.input, str) else asked.input
    if asked.previous_response_id is None:
        return items
    before = service.kept.find(asked.previous_response_id)
    if before is None:
        raise APIError(
            400,
            f"previous_response_id: '{asked.previous_response_id}' is not kept here, or no longer; send the whole "
            "conversation as input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    return msgspec.json.decode(before.items, type=list[schema.InputItem]) + items


class _Answer(Answer):
    def __init__(
        self,
        service: Service,
        request: Request,
        turn: Turn,
        asked: schema.ResponsesRequest,
        fields: dict[str, Any],
        items: list[schema.InputItem],
        tools: dict[str, Offered],
    ) -> None:
        super().__init__(service, request, turn)
        self._keeps = asked.store is not False
        self._items, self._tools = items, tools
        self._key = uuid.uuid4().hex  # who knows it can read the answer; the request's id may be a client's choice
        self._output: list[schema.Item] = []
        self._events = 0
        self._told = schema.ResponseObject(
            id=f"resp_{self._key}",
            created_at=int(time.time()),
            instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens,
            metadata=asked.metadata or {},
            model=service.model,
            output=self._output,
            parallel_tool_calls=asked.parallel_tool_calls is not False,
            previous_response_id=asked.previous_response_id,
            reasoning={"effort": None, "summary": None} | (fields.get("reasoning") or {}),
            store=self._keeps,
            temperature=asked.temperature,
            text={"format": {"type": "text"}} | (fields.get("text") or {}),
            tool_choice=asked.tool_choice or "auto",
            tools=fields.get("tools") or [],
            top_p=asked.top_p,
        )

    def begins(self, generation: Generation) -> Iterator[schema.ResponseEvent]:
        yield self._event("response.created", response=self._told)
        yield self._event("response.in_progress", response=self._told)

    def step(self, step: Step) -> Iterator[schema.ResponseEvent]:
        what, block, more = step
        item = self._item(block, "in_progress")
        at = {"output_index": block.index}
        part: dict[str, Any] = at | {"item_id": item.id}
        if block.kind != "call":
            part["content_index"] = 0
        name = {"reasoning": "reasoning_text", "text": "output_text", "call": "function_call_arguments"}[block.kind]
        logprobs: Any = [] if block.kind == "text" else UNSET
        if what == "grows":
            yield self._event(f"response.{name}.delta", **part, delta=more, logprobs=logprobs)
        elif what == "begins":
            yield self._event("response.output_item.added", **at, item=item)
            if block.kind != "call":
                yield self._event("response.content_part.added", **part, part=_part(block))
        else:
            whole = {"arguments" if block.kind == "call" else "text": block.text}
            yield self._event(f"response.{name}.done", **part, **whole, logprobs=logprobs)
            if block.kind != "call":
                yield self._event("response.content_part.done", **part, part=_part(block))
            yield self._event("response.output_item.done", **at, item=self._item(block, _status(block)))

    def ends(self, completion: Completion) -> Iterator[schema.ResponseEvent]:
        whole = self.whole(completion)
        yield self._event(f"response.{whole.status}", response=whole)

    def failed(self, error: APIError) -> schema.ResponseEvent:
        failure = schema.Failure("server_error", error.info.message)
        told = msgspec.structs.replace(self._told, status="failed", error=failure)
        return self._event("response.failed", response=told)

    def whole(self, completion: Completion) -> schema.ResponseObject:
        self._output += [self._item(block, _status(block)) for block in self.blocks.all]
        cut = completion.finish_reason == StopReason.LENGTH
        told = msgspec.structs.replace(
            self._told,
            completed_at=int(time.time()),
            status="incomplete" if cut else "completed",
            incomplete_details=schema.Incomplete() if cut else None,
            usage=schema.ResponsesUsage(
                input_tokens=completion.prompt_tokens,
                input_tokens_details=schema.CachedInput(completion.cached_tokens),
                output_tokens=completion.completion_tokens,
                output_tokens_details=schema.ReasoningOutput(self.blocks.reasoning_tokens),
                total_tokens=completion.prompt_tokens + completion.completion_tokens,
            ),
        )
        if self._keeps:
            said = msgspec.convert(msgspec.to_builtins(self._output), list[schema.InputItem])
            self.service.kept.keep(told.id, Kept(msgspec.json.encode(told), msgspec.json.encode(self._items + said)))
        return told

    def _event(self, type: str, **fields: Any) -> schema.ResponseEvent:
        self._events += 1
        return schema.ResponseEvent(type=type, sequence_number=self._events - 1, **fields)

    def _item(self, block: Block, status: schema.Status) -> schema.Item:
        part = [_part(block)] if status != "in_progress" else []
        match block.kind:
            case "text":
                return schema.OutputMessage(id=f"msg_{self._key}_{block.index}", status=status, content=part)
            case "reasoning":
                return schema.ReasoningItem(id=f"rs_{self._key}_{block.index}", status=status, content=part)
        found = self._tools[block.name]
        return schema.FunctionCallItem(
            id=f"fc_{self._key}_{block.index}",
            call_id=block.call_id,
            name=found.tool.name or "",
            namespace=found.namespace or UNSET,
            arguments="" if status == "in_progress" else block.text,
            status=status,
        )


def _part(block: Block) -> Any:
    """As far as it has come: empty at first."""
    return schema.ReasoningText(text=block.text) if block.kind == "reasoning" else schema.OutputText(text=block.text)


def _status(block: Block) -> schema.Status:
    return "incomplete" if block.cut else "completed"
