"""What is served and how it does: GET /v1/models, /v1/ring, /health and /metrics."""

from __future__ import annotations

from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from ringlm.cluster.messages import LinkStats, MeasuredLink
from ringlm.frontend.server.monitor import Link, Step
from ringlm.frontend.server.responses import encoded
from ringlm.frontend.server.service import Service

_AS_READY = ("epoch", "recoveries", "world_size", "full_world_size", "dtype", "quant", "context", "measured")


class Model(msgspec.Struct, kw_only=True):
    """What is served, under one of its names; `max_model_len` is the context: a prompt and its answer together."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "ringlm"
    max_model_len: int


class Models(msgspec.Struct, kw_only=True):
    """The model, by each of its names."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(msgspec.Struct, kw_only=True):
    """Whether every rank is well; while one is awaited it is degraded, `rank` being that one and `reason` what happened
    to it; also for the moment in which more ranks are taken in, `rank` being null."""

    status: Literal["ok", "degraded"] = "ok"
    world_size: int
    rank: int | None = None
    reason: str | None = None


class Rank(msgspec.Struct, kw_only=True):
    """A rank, the `host` that it runs on, and what it holds. `link` is rank 0's to it, which has none to itself. A
    `slow` one computes for so many times as long as the others, which wait for it."""

    rank: int
    host: str = ""
    device: str
    threads: int
    weights_bytes: int
    peak_bytes: int
    link: LinkStats | None
    slow: float | None


class Cache(msgspec.Struct, kw_only=True):
    """Blocks of the cache: all, those that requests hold, those free that hold a prefix which may be asked for."""

    blocks: int
    in_use: int
    cached: int


class Steps(msgspec.Struct, kw_only=True):
    """The engine's steps since its start, and where their time went: of `seconds`, `ring_s` in collectives, and
    `forward_s` in forward passes, their collectives included."""

    count: int
    seconds: float
    ring_s: float
    forward_s: float


class RingReport(msgspec.Struct, kw_only=True):
    """The ring and how it does; what may be null is so until the engine has worked. In another `epoch` than before it
    has been formed again, which `recoveries` counts; while it is `recovering`, `reason` says why, `lost` is the rank
    that is awaited, and `ranks` are those of before. `spares` wait to take the place of a lost rank. `step`,
    `tokens_per_s` and the rates of `links` are of the last second of work, for ten seconds. `measured` are the links by
    which ranks were given to those who had joined. With a `world_size` below `full_world_size` it takes in who
    joins."""

    model: str
    state: Literal["ready", "recovering"]
    reason: str | None
    lost: int | None = None
    epoch: int
    recoveries: int
    world_size: int
    full_world_size: int
    dtype: str
    quant: str
    context: int
    ranks: list[Rank]
    tokens_per_s: float
    measured: list[MeasuredLink] = []
    links: list[Link] = []
    spares: int | None = None
    running: int | None = None
    waiting: int | None = None
    preemptions: int | None = None
    cache: Cache | None = None
    steps: Steps | None = None
    step: Step | None = None


async def models(request: Request, service: Service) -> Response:
    """Tell what is served."""
    return encoded(Models(data=[_model(service, name) for name in service.models]))


async def model(request: Request, service: Service) -> Response:
    """Tell about the model of this id."""
    name = request.path_params["id"]
    service.check_model(name)
    return encoded(_model(service, name))


async def health(request: Request, service: Service) -> Response:
    """Tell whether every rank is well; needs no key."""
    if service.session.failure is not None:
        raise service.session.failure
    world_size, recovering = service.session.ready.world_size, service.session.recovering
    if recovering is None:
        return encoded(Health(world_size=world_size))
    degraded = Health(status="degraded", world_size=world_size, rank=recovering.rank, reason=recovering.reason)
    return encoded(degraded, 503)


async def metrics(request: Request, service: Service) -> Response:
    """Tell Prometheus how the server does."""
    service.monitor.look()
    text, media = service.metrics.exposition(request.headers.get("accept", ""))
    return Response(text, headers={"Content-Type": media})


async def ring(request: Request, service: Service) -> Response:
    """Tell of ranks, devices, links and speed."""
    ready, recovering = service.session.ready, service.session.recovering
    service.monitor.look()
    stats, rates = service.session.stats(), service.monitor.rates
    links = {link.rank: link for link in stats.links} if stats is not None else {}
    report = RingReport(
        model=service.model,
        state="ready" if recovering is None else "recovering",
        reason=None if recovering is None else recovering.reason,
        lost=None if recovering is None else recovering.rank,
        **{name: getattr(ready, name) for name in _AS_READY},
        ranks=[
            Rank(
                rank=rank,
                link=links.get(rank),
                slow=None if stats is None else stats.slow.get(rank),
                **msgspec.structs.asdict(each),
            )
            for rank, each in enumerate(ready.ranks)
        ],
        tokens_per_s=round(rates.tokens_per_s, 2),
        links=rates.links,
    )
    if stats is not None:
        report.spares = stats.spares
        report.running, report.waiting, report.preemptions = stats.running, stats.waiting, stats.preemptions
        report.cache = Cache(blocks=stats.blocks, in_use=stats.blocks_in_use, cached=stats.blocks_cached)
        report.steps = Steps(count=stats.steps, seconds=stats.step_s, ring_s=stats.ring_s, forward_s=stats.forward_s)
        report.step = rates.step
    return encoded(report)


def _model(service: Service, name: str) -> Model:
    return Model(id=name, created=service.created, max_model_len=service.session.ready.context)
