"""The ring: sockets, handshakes and collectives. A leaf: knows tensors as bytes and dtypes, no models.

from ringlm.ring import RingConfig, connect
with connect(RingConfig.from_env()) as ring:
    ring.all_reduce(tensor)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ringlm.ring.config import RingConfig

if TYPE_CHECKING:
    from ringlm.ring.control import Heartbeat
    from ringlm.ring.forming import connect
    from ringlm.ring.ring import Ring

__all__ = ["Heartbeat", "Ring", "RingConfig", "connect"]

_HOMES = {"Heartbeat": "control", "Ring": "ring", "connect": "forming"}


def __getattr__(name: str) -> object:
    # torch comes with the collectives; reading a RingConfig does not need it
    if name not in _HOMES:
        raise AttributeError(f"module 'ringlm.ring' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"ringlm.ring.{_HOMES[name]}"), name)
