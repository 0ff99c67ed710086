"""A request's body, read within limits of size and time, as the struct that an endpoint takes."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from ringlm.frontend.server.errors import APIError

BODY_S = 60.0  # for all of it

_Body = TypeVar("_Body", bound=msgspec.Struct)
_PLACE = re.compile(r" - at `(?:\w+` in `)?\$(?:\.(\w+))?")

log = logging.getLogger("ringlm.server")


class Bodies:
    """Reads bodies of up to `max_bytes`."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._told: set[str] = set()  # fields that were ignored, and logged

    async def read(self, request: Request, kind: type[_Body]) -> tuple[_Body, dict[str, Any]]:
        """The body as a `kind` and as it came. Fields that `kind` does not know are ignored: clients are often ahead
        of servers. Those in its `refused` would change the answer, and are not. Raises APIError."""
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media != "application/json":  # which no web page may send elsewhere without being asked (CORS)
            raise APIError(415, "the body must be JSON; send the header Content-Type: application/json.")
        try:
            raw = await asyncio.wait_for(self._body(request), BODY_S)
        except asyncio.TimeoutError:
            raise APIError(408, f"the body did not come within {BODY_S:.0f} s.") from None
        try:
            fields = msgspec.json.decode(raw)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise APIError(400, f"the body is not valid JSON: {error}.") from None
        if not isinstance(fields, dict):
            raise APIError(400, "the body must be a JSON object.")
        refused: dict[str, str] = getattr(kind, "refused", {})
        for name, why in refused.items():
            if fields.get(name) is not None:
                raise APIError(400, f"{name} is not supported: {why}.", param=name)
        self._note_ignored(fields, kind)
        try:
            return msgspec.convert(fields, kind, str_keys=True), fields
        except msgspec.ValidationError as error:
            place = _PLACE.search(str(error))
            raise APIError(400, f"{error}.", param=place[1] if place else None) from None

    async def _body(self, request: Request) -> bytes:
        declared = request.headers.get("content-length", "")
        body = bytearray()
        try:
            if declared.isdigit() and int(declared) > self._max_bytes:
                raise self._too_large()
            async for chunk in request.stream():
                body += chunk
                if len(body) > self._max_bytes:
                    raise self._too_large()
        except ClientDisconnect:
            raise APIError(400, "the body ended before its end.") from None  # which nobody reads
        return bytes(body)

    def _too_large(self) -> APIError:
        return APIError(413, f"the body has more than {self._max_bytes:,} bytes; --max-body sets how many may be.")

    def _note_ignored(self, fields: dict[str, Any], kind: type[msgspec.Struct]) -> None:
        ignored = fields.keys() - set(kind.__struct_fields__) - self._told - {"metadata", "store", "service_tier"}
        for name in sorted(ignored)[:10]:
            if len(self._told) < 100:  # a client may make names up
                self._told.add(name)
                log.info("the field %.64r of %s is ignored", name, kind.__name__)
