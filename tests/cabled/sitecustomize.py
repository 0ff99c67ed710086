"""On the path of a process, this sends what it dials through relays: RINGLM_TEST_RELAYS is "port:relay port,…".

So a rank is behind its cables in every ring that it forms, and nothing of ringlm knows.
"""

from __future__ import annotations

import os
import socket
from typing import Any

_dial = socket.create_connection
_relays = dict(pair.split(":") for pair in os.environ.get("RINGLM_TEST_RELAYS", "").split(",") if pair)


def _through(address: tuple[str, int], *arguments: Any, **options: Any) -> socket.socket:
    host, port = address
    return _dial((host, int(_relays.get(str(port), port))), *arguments, **options)


socket.create_connection = _through
