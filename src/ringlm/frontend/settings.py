"""What a caller asked for, checked, as the specification of an engine. Shared by the command line and the API."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.errors import ConfigError
from ringlm.frontend.model import Model
from ringlm.ring.address import parse_port
from ringlm.ring.config import RingConfig
from ringlm.ring.seal import Mode

_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


def engine_spec(
    model: Model, *, split: Sequence[float] | None = None, adapter: str | Path | None = None, **more: Any
) -> EngineSpec:
    """The specification of this rank's engine, or of `local_ranks` on this machine; `more` are fields of Settings and
    of EngineSpec. Raises ConfigError."""
    shared = {name: more.pop(name) for name in Settings.__struct_fields__ if name in more}
    settings = Settings(format=model.format, split=None if split is None else tuple(split), **shared)
    spec = EngineSpec(
        model=str(model.path.absolute()),  # links stay: in Hugging Face's cache their targets have no names
        settings=settings,
        adapter=None if adapter is None else str(Path(adapter).expanduser().absolute()),
        **more,
    )
    if not _DEVICE.fullmatch(spec.device):
        raise ConfigError(f"--device {spec.device} is not known; choose auto, cpu, cuda or mps.")
    if spec.rejoin_timeout_s < 0:
        raise ConfigError(f"rejoin_timeout is {spec.rejoin_timeout_s}; it must be 0 or more.")
    if spec.threads is not None and spec.threads < 1:
        raise ConfigError(f"--threads is {spec.threads}; it must be 1 or more.")
    if settings.split is not None and len(settings.split) != spec.world_size:
        raise ConfigError(
            f"--split has {len(settings.split)} weights for world size {spec.world_size}; give one a rank."
        )
    return spec


def lone_ring(secret: bytes | None, interface: str | None, seal: str | None, port: int) -> RingConfig:
    """Of a process that knows no other rank yet: where it listens, `port` unless RING_PORT says another, and what it
    shares with those it will meet. Raises ConfigError."""
    return RingConfig(
        port=parse_port(os.environ.get("RING_PORT") or port, "RING_PORT", zero=port == 0),
        secret=secret,
        interface=interface or os.environ.get("RING_INTERFACE"),
        seal=cast("Mode | None", seal or os.environ.get("RING_SEAL")),  # which it checks
    )


def ring_from_env() -> RingConfig | None:
    """The ring that RING_* or a launcher's variables describe, if they do. Raises ConfigError."""
    return RingConfig.from_env(os.environ) if RingConfig.present(os.environ) else None
