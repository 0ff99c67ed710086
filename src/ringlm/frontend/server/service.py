"""What all endpoints work with: one session, the names of its model, its metrics."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from ringlm.frontend.metrics import Metrics
from ringlm.frontend.server.errors import APIError
from ringlm.frontend.server.monitor import Monitor
from ringlm.frontend.server.requests import Bodies
from ringlm.frontend.server.responses_store import ResponseStore
from ringlm.frontend.server.schemas import OfModel
from ringlm.frontend.session import Session

_Body = TypeVar("_Body", bound=OfModel)


@dataclass(frozen=True)
class Service:
    """The model answers to all of `models`, the first of which is told."""

    session: Session
    models: tuple[str, ...]
    bodies: Bodies
    metrics: Metrics
    monitor: Monitor
    created: int  # in Unix seconds
    kept: ResponseStore = field(default_factory=ResponseStore)

    @property
    def model(self) -> str:
        return self.models[0]

    def awaited(self) -> str | None:
        """For whom the ring waits, if it does."""
        recovering = self.session.recovering
        if recovering is None:
            return None
        return "more ranks" if recovering.rank is None else f"rank {recovering.rank}"

    def check_model(self, model: str | None) -> None:
        """Raises APIError for a model that is not served."""
        if model is not None and model not in self.models:
            raise APIError(
                404,
                f"the model '{model}' is not served here; '{self.model}' is.",
                param="model",
                code="model_not_found",
            )

    async def read(self, request: Request, kind: type[_Body]) -> tuple[_Body, dict[str, Any]]:
        """A body about a model that is served, as `Bodies.read` gives it. Raises APIError."""
        asked, fields = await self.bodies.read(request, kind)
        self.check_model(asked.model)
        return asked, fields
