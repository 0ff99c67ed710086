"""Who may ask: requests without one of the keys are refused before anything of them is read."""

from __future__ import annotations

import hmac
from collections.abc import Collection, Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ringlm.errors import ConfigError
from ringlm.frontend.server.errors import APIError, error_response

SCHEME = "bearer "


class Keys:
    """Lets through what bears one of `keys`, everything if there are none, and whoever asks for a path that is
    `open_to_all`."""

    def __init__(self, app: ASGIApp, keys: Sequence[bytes], open_to_all: Collection[str]) -> None:
        self._app = app
        self._open = open_to_all
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if (
            self._keys
            and scope["type"] == "http"
            and scope["path"] not in self._open
            and not self._has_key(Headers(scope=scope))
        ):
            app = error_response(
                APIError(
                    401,
                    "a key is missing, or wrong; send Authorization: Bearer KEY, or X-Api-Key: KEY.",
                    headers={"WWW-Authenticate": "Bearer"},
                ),
                scope["path"],
            )
        await app(scope, receive, send)

    def _has_key(self, headers: Headers) -> bool:
        bearer = headers.get("authorization", "")
        given = [headers.get("x-api-key", "")]  # as Anthropic's clients send it
        given += [bearer[len(SCHEME) :]] if bearer.lower().startswith(SCHEME) else []
        keys = [key.strip().encode("latin-1") for key in given]
        # All are compared, each in constant time, so that the time tells nothing.
        return sum(hmac.compare_digest(key, known) for key in keys for known in self._keys) > 0


def read_keys(given: Sequence[str], file: Path | None) -> tuple[bytes, ...]:
    """The keys of the command line and of a file with one a line. Raises ConfigError, which shows none of them."""
    keys = list(given)
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--api-key-file {file}: cannot be read: {error}.") from error
        keys += [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise ConfigError(f"--api-key-file {file}: holds no key; write one a line.")
    for key in keys:
        if not (key.isascii() and key.isprintable()) or not key or " " in key:
            raise ConfigError("an API key is empty, or has spaces or other characters that no header can carry.")
    return tuple(key.encode() for key in keys)
