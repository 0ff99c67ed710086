"""ringlm: one language model across the machines you already have.

    from ringlm import LLM, SamplingParams, RingConfig, StopReason

The names below are imported on first use: `import ringlm` costs milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ringlm.engine.request import SamplingParams, StopReason, StructuredOutputsParams
    from ringlm.errors import RingLMError
    from ringlm.frontend.api import LLM
    from ringlm.frontend.async_api import AsyncLLM
    from ringlm.ring.config import RingConfig

_HOMES = {
    "LLM": "ringlm.frontend.api",
    "AsyncLLM": "ringlm.frontend.async_api",
    "SamplingParams": "ringlm.engine.request",
    "StopReason": "ringlm.engine.request",
    "StructuredOutputsParams": "ringlm.engine.request",
    "RingConfig": "ringlm.ring.config",
    "RingLMError": "ringlm.errors",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "SamplingParams",
    "StructuredOutputsParams",
    "RingConfig",
    "StopReason",
    "RingLMError",
    "__version__",
]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ringlm' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
