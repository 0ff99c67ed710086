"""From an EngineSpec to a loaded model: open the files, agree with the other ranks on settings, load this shard.

Knows no processes, and not how a ring forms.
"""

from __future__ import annotations

import gc
import logging
import resource
import socket
import sys
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from ringlm.cluster.agreement import BITS, Agreement, Capabilities, Refused, decide_together, fast_dtypes, told
from ringlm.cluster.cores import threads_for
from ringlm.cluster.memory import Memory, host_memory
from ringlm.cluster.messages import RankReport, Ready
from ringlm.cluster.settings import Settings
from ringlm.cluster.spec import EngineSpec
from ringlm.engine.runner import Runner
from ringlm.errors import ConfigError
from ringlm.models.causal_lm import CausalLM
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone, Communicator, Relinked
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
    rejoin_timeout_s: float  # rank 0's


class _Kept(NamedTuple):
    """The model of the last ring, and what it was loaded for: the same again needs no loading."""

    purpose: tuple[object, ...]
    model: CausalLM
    comm: Relinked


class Loader:
    """What one rank brings to ring after ring: its files, its device, its memory as it was before it loaded anything,
    and the model that it has. Raises ConfigError and ModelError."""

    def __init__(self, spec: EngineSpec) -> None:
        torch.set_grad_enabled(False)
        self.spec = spec
        self.files = open_model(spec.model, spec.adapter)
        self.device = pick_device(spec.device)
        self._memory: Memory | None = None
        self._kept: _Kept | None = None

    def capabilities(self, rank: int, settings: Settings) -> Capabilities:
        """What this rank can do, as rank 0 wants to know it."""
        self._memory = self._memory or device_memory(self.device)
        kinds = fast_dtypes(str(self.device), settings.quant)
        return Capabilities(rank, str(self.device), kinds, settings, self._memory, hardware(self.device))

    def load(
        self,
        ring: Ring | None,
        settings: Settings,
        epoch: int = 0,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> Loaded:
        """Agree with the other ranks of `ring`, load this rank's shard unless it is loaded already, and return once
        every rank has. Raises ConfigError or ModelError where the ranks cannot agree or the model cannot be split."""
        spec, files = self.spec, self.files
        here, rank = ((0,), 0) if ring is None else (ring.here, ring.rank)
        if self.device.type == "cuda":
            self.device = own_gpu(self.device, here.index(rank))
        threads = spec.threads or threads_for(len(here))
        torch.set_num_threads(threads)
        mine = self.capabilities(rank, settings)
        agreement = decide_together(ring or Alone(), files, mine, spec.rejoin_timeout_s)
        settings, plan = agreement.settings, agreement.plan
        assert plan is not None
        comm = _communicator(ring, settings.backend, self.device, spec.ring)
        assert settings.max_seqs is not None
        assert settings.blocks is not None
        model = self._model(comm, agreement, on_progress)
        report = RankReport(str(self.device), threads, model.nbytes, peak_memory(), socket.gethostname())
        reports = comm.gather_bytes(msgspec.msgpack.encode(report))  # every rank has loaded
        comm.broadcast_bytes(b"" if comm.rank == 0 else None)
        log.info(
            "rank %d of %d ready: %s, %s, %d threads, %.0f MB of weights",
            comm.rank, comm.world_size, self.device, settings.dtype, threads, model.nbytes / 1e6,
        )  # fmt: skip
        ready = Ready(
            model=files.name,
            world_size=comm.world_size,
            context=model.config.context,
            vocabulary=model.config.vocabulary,
            eos_token_ids=list(model.config.eos_token_ids),
            dtype=settings.dtype,
            quant=settings.quant,
            ranks=[told(data, RankReport, rank) for rank, data in enumerate(reports or ())],
            epoch=epoch,
        )
        runner = Runner(model, model.new_cache(settings.blocks), comm)
        return Loaded(runner, settings.max_seqs, comm, ready, agreement.rejoin_timeout_s)

    def _model(
        self, comm: Communicator, agreement: Agreement, on_progress: Callable[[int, int], None] | None
    ) -> CausalLM:
        """This rank's part, with `comm` as its links: the one that it has, if that is what is wanted."""
        settings, plan = agreement.settings, agreement.plan
        assert plan is not None
        assert settings.context is not None
        shard, led = plan.ranks[comm.rank], agreement.led
        purpose = comm.rank, comm.world_size, shard, settings.context, settings.dtype, settings.quant, led
        if self._kept is not None and self._kept.purpose == purpose:
            self._kept.comm.relink(comm)
            return self._kept.model
        self._kept = None
        gc.collect()  # its memory is needed
        links = Relinked(comm)
        model = load_model(
            self.files,
            plan,
            comm.rank,
            links,
            device=self.device,
            dtype=getattr(torch, settings.dtype),
            context=settings.context,
            bits=BITS[settings.quant],
            led=led,
            progress=on_progress,
        )
        self._kept = _Kept(purpose, model, links)
        return model


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
    torch.backends.cuda.enable_cudnn_sdp(False)  # it fails at some spans of many requests
    return device


def device_memory(device: torch.device) -> Memory:
    """What is free where `device` keeps its tensors; MPS and the CPU share the machine's."""
    if device.type != "cuda":
        return host_memory()
    return Memory(str(torch.cuda.get_device_properties(device).uuid), torch.cuda.mem_get_info(device)[0])


def hardware(device: torch.device) -> str:
    """What computes, and by how many threads, which sums may be divided among."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return f"{name}, torch {torch.__version__}, {torch.get_num_threads()} threads"
