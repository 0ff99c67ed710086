"""The OpenAPI document of a table of endpoints, made from the structs that they read and write."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ringlm import __version__
from ringlm.frontend.server.errors import error_kind
from ringlm.frontend.server.service import Service

_VARIABLE = re.compile(r"\{(\w+)(:\w+)?\}")
_TEMPLATE = "#/components/schemas/{name}"


class Endpoint(NamedTuple):
    """What answers where. It `takes` a body and `gives` another, or with `stream` in it a stream of events; without
    `gives` it is plain text."""

    method: str
    path: str
    answer: Callable[[Request, Service], Awaitable[Response]]
    takes: type[msgspec.Struct] | None = None
    gives: type[msgspec.Struct] | None = None
    event: type[msgspec.Struct] | None = None


def document(endpoints: Sequence[Endpoint], needs_key: bool) -> dict[str, Any]:
    """OpenAPI 3.1, as what JSON stands for."""
    kinds = {
        kind
        for each in endpoints
        for kind in (each.takes, each.gives, each.event, error_kind(each.path))
        if kind is not None
    }
    _, components = msgspec.json.schema_components(
        sorted(kinds, key=lambda kind: kind.__name__), ref_template=_TEMPLATE
    )
    paths: dict[str, dict[str, Any]] = {}
    for each in endpoints:
        paths.setdefault(_VARIABLE.sub(r"{\1}", each.path), {})[each.method.lower()] = _operation(each)
    result: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {
            "title": "ringlm",
            "version": __version__,
            "description": "One language model across the machines of a ring, behind OpenAI's API.",
        },
        "paths": paths,
        "components": {"schemas": components},
    }
    if needs_key:
        result["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        result["security"] = [{"key": []}]
        paths["/health"]["get"]["security"] = []
    return result


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if endpoint.gives is not None:
        content["application/json"] = _schema(endpoint.gives)
    else:
        content["text/plain"] = {"schema": {"type": "string"}}
    if endpoint.event is not None:  # one of them, with its fields
        data = {"type": "string", "contentMediaType": "application/json", "contentSchema": _ref(endpoint.event)}
        event = {"type": "object", "properties": {"event": {"type": "string"}, "data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    operation: dict[str, Any] = {
        "operationId": endpoint.answer.__name__,
        "summary": inspect.cleandoc(endpoint.answer.__doc__ or ""),
        "responses": {
            "200": {"description": "Done.", "content": content},
            "default": {"description": "Why not.", "content": {"application/json": _schema(error_kind(endpoint.path))}},
        },
    }
    if endpoint.takes is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": _schema(endpoint.takes)}}
    names = [name for name, _ in _VARIABLE.findall(endpoint.path)]
    if names:
        operation["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    return operation


def _schema(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {"schema": _ref(kind)}


def _ref(kind: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _TEMPLATE.format(name=kind.__name__)}
