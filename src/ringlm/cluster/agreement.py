"""From an EngineSpec to a loaded model: open the files, join the ring, agree on settings, load this shard.

Rank 0 decides the settings and the shard plan from what every rank can do; whatever it refuses, it
refuses for all of them, in the same words, before a weight is read.
"""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
import torch

from ringlm.cluster.cores import threads_for
from ringlm.cluster.messages import RankReport, Ready
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.runner import Runner
from ringlm.errors import ConfigError, RingLMError
from ringlm.models.config import dimensions
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone, Communicator
from ringlm.parallel.kernels.choice import processor
from ringlm.parallel.shard import ShardPlan, plan_shards
from ringlm.ring import Ring, RingConfig
from ringlm.weights.files import ModelFiles, open_model

log = logging.getLogger("ringlm")


BITS: Final = {"none": None, "int8": 8, "int4": 4}
DEFAULT_CONTEXT = 8192
DEFAULT_MAX_SEQS = 8


class Refused(ConfigError):
    """Rank 0 refused for all; every rank raises it in the same words."""


class Capabilities(msgspec.Struct, frozen=True, array_like=True):
    """What one rank tells rank 0 before anything is loaded. `dtypes` are those it is fast in, the best first."""

    rank: int
    device: str
    dtypes: list[str]
    settings: Settings
    hardware: str = ""  # on equal ones the same computation gives the same bits


class Agreement(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0's decision, or in `refused` why there is none."""

    settings: Settings
    plan: ShardPlan | None
    refused: str | None = None
    led: bool = False  # the ranks' hardware differs: rank 0 chooses the experts for all


class Loaded(NamedTuple):
    """A rank that is ready to run steps."""

    runner: Runner
    comm: Communicator
    ready: Ready


def load(
    spec: EngineSpec, join: Callable[[str], Ring], on_progress: Callable[[int, int], None] | None = None
) -> Loaded:
    """Load this rank's shard; returns once every rank has. `join` forms the ring, given the model's fingerprint.

    Raises ConfigError or ModelError where the ranks cannot agree or the model cannot be split.
    """
    torch.set_grad_enabled(False)
    files = open_model(spec.model, spec.settings.format)
    device = pick_device(spec.device)
    ring = join(files.fingerprint) if spec.world_size > 1 else None
    threads = spec.threads or threads_for(1 if ring is None else ring.machine_ranks)
    torch.set_num_threads(threads)
    agreement = _agree(ring or Alone(), files, spec, device)
    settings, plan = agreement.settings, agreement.plan
    assert plan is not None
    comm = _communicator(ring, settings.backend, device, spec.ring)
    dtype = getattr(torch, settings.dtype)
    assert settings.context is not None
    assert settings.max_seqs is not None
    model = load_model(
        files,
        plan,
        comm.rank,
        comm,
        device=device,
        dtype=dtype,
        context=settings.context,
        bits=BITS[settings.quant],
        led=agreement.led,
        progress=on_progress,
    )
    report = RankReport(str(device), threads, model.nbytes, peak_memory())
    reports = comm.gather_bytes(msgspec.msgpack.encode(report))  # every rank has loaded
    comm.broadcast_bytes(b"" if comm.rank == 0 else None)
    log.info(
        "rank %d of %d ready: %s, %s, %d threads, %.0f MB of weights",
        comm.rank, comm.world_size, device, settings.dtype, threads, model.nbytes / 1e6,
    )  # fmt: skip
    ready = Ready(
        model=files.name,
        world_size=comm.world_size,
        context=settings.context,
        vocabulary=model.config.vocabulary,
        eos_token_ids=list(model.config.eos_token_ids),
        dtype=settings.dtype,
        quant=settings.quant,
        ranks=[msgspec.msgpack.decode(data, type=RankReport) for data in reports or ()],
    )
    return Loaded(Runner(model, model.new_cache(settings.max_seqs), comm), comm, ready)


def _communicator(ring: Ring | None, backend: str, device: torch.device, config: RingConfig | None) -> Communicator:
    """What carries tensors and step messages: the ring, or a torch.distributed group of its ranks."""
    if ring is None or config is None:
        return Alone()
    if backend == "ring":
        return ring
    if ring.topology == "chain":
        raise Refused(
            f"--backend {backend} needs a way between any two ranks, and some here have one only through others; "
            "choose ring."
        )
    from ringlm.parallel.torch_group import TorchGroup  # and with it torch.distributed

    host, port = ring.host, 0
    # Without a right neighbour's address the ring itself has met at the master, and has the port.
    if config.rank == 0 and config.master is not None and config.right is not None:
        host, port = config.master
    return TorchGroup(ring, backend, device, check=ring.check, host=host, port=port, timeout_s=config.connect_timeout_s)


def peak_memory() -> int:
    """The most memory that this process had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, the others KiB


def pick_device(name: str) -> torch.device:
    """The device that 'auto', 'cpu', 'cuda' or 'mps' means here. Raises ConfigError when there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if name not in there:
        raise ConfigError(f"--device {name} is not known; choose auto, cpu, cuda or mps.")
    if not there[name]:
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds no such device here; try --device cpu.")
    return torch.device(name)


def fast_dtypes(device: torch.device, quant: str = "none") -> list[str]:
    """The dtypes that `device` computes quickly in. Without bf16 instructions a CPU's half types are ten times slower
    than float32 in prefill, and its packed weights give float32 (docs/performance.md); accelerators unpack to any."""
    if device.type == "cuda":
        return ["bfloat16", "float16", "float32"]
    if device.type == "mps":
        return ["float16", "float32"]
    return ["bfloat16", "float32"] if quant == "none" and torch.cpu._is_avx512_bf16_supported() else ["float32"]


def _agree(comm: Communicator, files: ModelFiles, spec: EngineSpec, device: torch.device) -> Agreement:
    """Rank 0's decision, the same on every rank, and a plan in it."""
    dtypes = fast_dtypes(device, spec.settings.quant)
    mine = Capabilities(comm.rank, str(device), dtypes, spec.settings, _hardware(device))
    gathered = comm.gather_bytes(msgspec.msgpack.encode(mine))
    decision = b""
    if gathered is not None:
        ranks = [msgspec.msgpack.decode(data, type=Capabilities) for data in gathered]
        decision = msgspec.msgpack.encode(_decide(ranks, files))
    decided = msgspec.msgpack.decode(comm.broadcast_bytes(decision if comm.rank == 0 else None), type=Agreement)
    if decided.refused is not None:
        comm.gather_bytes(b"")  # every rank has heard it, and none needs to be told by an abort
        raise Refused(decided.refused)
    return decided


def _hardware(device: torch.device) -> str:
    """What computes, and by how many threads, which sums may be divided among."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"


def _decide(ranks: list[Capabilities], files: ModelFiles) -> Agreement:
    try:
        sizes = dimensions(files.config, files.name)
        settings = agree(ranks, sizes.context)
        plan = plan_shards(sizes, len(ranks), settings.split)
    except RingLMError as error:
        return Agreement(Settings(), None, str(error))
    return Agreement(settings, plan, led=len({rank.hardware for rank in ranks}) > 1)


def agree(ranks: list[Capabilities], model_context: int) -> Settings:
    """The settings of the ring, complete. Raises ConfigError when a daemon was told something else."""
    ours = ranks[0].settings
    for daemon in ranks[1:]:
        _check(daemon, ours)
    for rank in ranks:
        if ours.backend == "nccl" and not rank.device.startswith("cuda"):
            raise ConfigError(
                f"--backend nccl needs CUDA on every rank, and rank {rank.rank} computes on {rank.device}; "
                "choose gloo or ring."
            )
    dtype = ours.dtype
    if dtype == "auto":
        dtype = next((d for d in ("bfloat16", "float16") if all(d in rank.dtypes for rank in ranks)), "float32")
    if ours.split is not None and len(ours.split) != len(ranks):
        raise ConfigError(f"--split has {len(ours.split)} weights for world size {len(ranks)}; give one a rank.")
    context = ours.context or min(model_context, DEFAULT_CONTEXT)
    if context > model_context:
        raise ConfigError(f"--context {context} is more than the {model_context} positions the model was made for.")
    return msgspec.structs.replace(ours, dtype=dtype, context=context, max_seqs=ours.max_seqs or DEFAULT_MAX_SEQS)


def _check(daemon: Capabilities, ours: Settings) -> None:
    default = Settings()
    for name in Settings.__struct_fields__:
        theirs, mine = getattr(daemon.settings, name), getattr(ours, name)
        if theirs not in (getattr(default, name), mine):
            raise ConfigError(
                f"rank {daemon.rank} was started with {name} {theirs} and rank 0 with "
                f"{'none given' if mine is None else mine}; leave it out on rank {daemon.rank}, or give both the same."
            )
