"""Structs as JSON responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.responses import Response


def encoded(
    data: msgspec.Struct | dict[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """`data` as JSON."""
    return Response(msgspec.json.encode(data), status, dict(headers or {}), media_type="application/json")
