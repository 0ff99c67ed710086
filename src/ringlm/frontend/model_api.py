"""What `LLM` and `AsyncLLM` have in common: which model to start, and how."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ringlm.cluster.messages import Stats
from ringlm.errors import ConfigError
from ringlm.frontend.model import resolve
from ringlm.frontend.session import Session
from ringlm.frontend.settings import engine_spec, ring_from_env


class ModelApi:
    """The arguments, which `LLM` describes; a subclass starts by what `_begin` is given."""

    def __init__(
        self,
        model: str | Path,
        tensor_parallel: int | None = None,
        backend: str = "ring",
        device: str = "auto",
        dtype: str = "auto",
        quant: str = "none",
        context: int | None = None,
        split: Sequence[float] | None = None,
        chat_template: str | Path | None = None,
        tool_format: str | None = None,
        adapter: str | Path | None = None,
        rejoin_timeout: float = 0.0,
    ) -> None:
        self._started: Session | None = None
        self._begin(
            partial(
                _open,
                str(model),
                tensor_parallel,
                chat_template,
                tool_format,
                backend=backend,
                device=device,
                dtype=dtype,
                quant=quant,
                context=context,
                split=split,
                adapter=adapter,
                rejoin_timeout_s=rejoin_timeout,
            )
        )

    def _begin(self, start: Callable[[], Session]) -> None:
        raise NotImplementedError

    @property
    def _session(self) -> Session:
        if self._started is None:
            raise ConfigError("this AsyncLLM is not started; use `async with`, or `await llm.start()`.")
        return self._started

    @property
    def world_size(self) -> int:
        return self._session.ready.world_size

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer may have together."""
        return self._session.ready.context

    def stats(self) -> Stats | None:
        """How the engine does: what runs and waits, the cache, the links. A second old at most while it works; None
        before its first request."""
        return self._session.stats()


def _open(
    model: str,
    tensor_parallel: int | None,
    chat_template: str | Path | None,
    tool_format: str | None,
    **settings: Any,
) -> Session:
    """Start a session; on a daemon's rank serve instead, and exit."""
    if tensor_parallel is not None and tensor_parallel < 1:
        raise ConfigError(f"tensor_parallel is {tensor_parallel}; it must be 1 or more.")
    ring = ring_from_env()
    if ring is not None and tensor_parallel not in (None, ring.world_size):
        raise ConfigError(
            f"tensor_parallel is {tensor_parallel}, but the environment describes a ring of "
            f"{ring.world_size}; leave it out, or unset RING_* (or a launcher's variables)."
        )
    files = resolve(model)
    spec = engine_spec(files, ring=ring, local_ranks=1 if ring is not None else tensor_parallel or 1, **settings)
    if ring is not None and ring.rank != 0:
        from ringlm.cluster.client import run_rank

        sys.exit(run_rank(spec))
    template = None if chat_template is None else Path(chat_template)
    return Session.start(spec, files, chat_template=template, tool_format=tool_format)
