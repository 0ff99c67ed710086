"""From an EngineSpec to a loaded model: open the files, join the ring, agree on settings, load this shard."""

from __future__ import annotations

import logging
import resource
import sys
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from ringlm.cluster.agreement import BITS, Capabilities, Refused, decide_together, fast_dtypes
from ringlm.cluster.cores import threads_for
from ringlm.cluster.memory import Memory, host_memory
from ringlm.cluster.messages import RankReport, Ready
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.runner import Runner
from ringlm.errors import ConfigError
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone, Communicator
from ringlm.parallel.kernels.choice import processor
from ringlm.ring import Ring, RingConfig
from ringlm.weights.files import open_model

log = logging.getLogger("ringlm")


class Loaded(NamedTuple):
    """A rank that is ready to run steps."""

    runner: Runner
    max_seqs: int
    comm: Communicator
    ready: Ready


def load(
    spec: EngineSpec, join: Callable[[str], Ring], on_progress: Callable[[int, int], None] | None = None
) -> Loaded:
    """Load this rank's shard; returns once every rank has. `join` forms the ring, given the model's identity.

    Raises ConfigError or ModelError where the ranks cannot agree or the model cannot be split.
    """
    torch.set_grad_enabled(False)
    files = open_model(spec.model, spec.adapter)
    device = pick_device(spec.device)
    ring = join(files.identity) if spec.world_size > 1 else None
    here = (0,) if ring is None else ring.here
    if device.type == "cuda":
        device = own_gpu(device, here.index(0 if ring is None else ring.rank))
    threads = spec.threads or threads_for(len(here))
    torch.set_num_threads(threads)
    rank = 0 if ring is None else ring.rank
    kinds = fast_dtypes(str(device), spec.settings.quant)
    mine = Capabilities(rank, str(device), kinds, spec.settings, device_memory(device), _hardware(device))
    agreement = decide_together(ring or Alone(), files, mine)
    settings, plan = agreement.settings, agreement.plan
    assert plan is not None
    comm = _communicator(ring, settings.backend, device, spec.ring)
    dtype = getattr(torch, settings.dtype)
    assert settings.context is not None
    assert settings.max_seqs is not None
    assert settings.blocks is not None
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
    return Loaded(Runner(model, model.new_cache(settings.blocks), comm), settings.max_seqs, comm, ready)


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
    """The device that 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps' means here. Raises ConfigError when there is none."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    kind, _, index = name.partition(":")
    if kind not in there:
        raise ConfigError(f"--device {name} is not known; choose auto, cpu, cuda or mps.")
    if not there[kind] or int(index or 0) >= max(1, torch.cuda.device_count()):
        raise ConfigError(f"--device {name}: torch {torch.__version__} finds no such device here; try --device cpu.")
    return torch.device(name)


def own_gpu(device: torch.device, place: int) -> torch.device:
    """The GPU of the rank that is number `place` of those on this machine: one of its own while there are as many; an
    index that was asked for stays. It becomes the current one."""
    if device.index is None:
        device = torch.device("cuda", place % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def device_memory(device: torch.device) -> Memory:
    """What is free where `device` keeps its tensors; MPS and the CPU share the machine's."""
    if device.type != "cuda":
        return host_memory()
    return Memory(str(torch.cuda.get_device_properties(device).uuid), torch.cuda.mem_get_info(device)[0])


def _hardware(device: torch.device) -> str:
    """What computes, and by how many threads, which sums may be divided among."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
