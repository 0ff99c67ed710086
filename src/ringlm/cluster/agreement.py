"""What the ranks of a ring agree on before a weight is read: settings and the shard plan. Torch-free.

Rank 0 decides from what every rank can do and from its memory; whatever it refuses, it refuses for all of them, in
the same words. `ringlm plan` makes the same decision without a ring.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, TypeVar

import msgspec

from ringlm.cluster.memory import Memory, free_blocks, refuse_unfit
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError, DesyncError, RingLMError
from ringlm.models.config import read_config
from ringlm.models.sizes import Holding, blocks_for, holdings
from ringlm.parallel.shard import ShardPlan, plan_shards
from ringlm.weights.files import ModelFiles

if TYPE_CHECKING:
    from ringlm.parallel.communicator import Communicator

_Told = TypeVar("_Told")

BITS: Final = {"none": None, "int8": 8, "int4": 4}
DEFAULT_CONTEXT = 8192
DEFAULT_MAX_SEQS = 16


class Refused(ConfigError):
    """Rank 0 refused for all; every rank raises it in the same words."""


class Capabilities(msgspec.Struct, frozen=True, array_like=True):
    """What one rank tells rank 0 before anything is loaded. `dtypes` are those it is fast in, the best first."""

    rank: int
    device: str
    dtypes: list[str]
    settings: Settings
    memory: Memory
    hardware: str = ""  # on equal ones the same computation gives the same bits


class Agreement(msgspec.Struct, frozen=True, array_like=True):
    """Rank 0's decision, or in `refused` why there is none."""

    settings: Settings
    plan: ShardPlan | None
    refused: str | None = None
    led: bool = False  # the ranks' hardware differs: rank 0 chooses the experts for all
    rejoin_timeout_s: float = 0.0  # how long a lost rank is awaited; 0: it ends the others


class Proposal(NamedTuple):
    """Settings, complete; who holds what; and by rank how many bytes that is."""

    settings: Settings
    plan: ShardPlan
    holdings: list[Holding]


def fast_dtypes(device: str, quant: str = "none") -> list[str]:
    """The dtypes that `device` computes quickly in. Without bf16 instructions a CPU's half types are ten times slower
    than float32 in prefill, and its packed weights give float32 (docs/performance.md); accelerators unpack to any."""
    if device.startswith("cuda"):
        return ["bfloat16", "float16", "float32"]
    if device == "mps":
        return ["float16", "float32"]
    from llvmlite import binding  # knows as much of this CPU as torch does, and loads ten times faster

    return (
        ["bfloat16", "float32"]
        if quant == "none" and binding.get_host_cpu_features().get("avx512bf16")
        else ["float32"]
    )


def decide_together(
    comm: Communicator, files: ModelFiles, mine: Capabilities, rejoin_timeout_s: float = 0.0
) -> Agreement:
    """Rank 0's decision, the same on every rank, and a plan in it; `rejoin_timeout_s` counts there alone. Raises
    Refused."""
    gathered = comm.gather_bytes(msgspec.msgpack.encode(mine))
    decision = b""
    if gathered is not None:
        ranks = [told(data, Capabilities, rank) for rank, data in enumerate(gathered)]
        decided = msgspec.structs.replace(_decide(ranks, files), rejoin_timeout_s=rejoin_timeout_s)
        decision = msgspec.msgpack.encode(decided)
    decided = told(comm.broadcast_bytes(decision if comm.rank == 0 else None), Agreement, 0)
    if decided.refused is not None:
        comm.gather_bytes(b"")  # every rank has heard it, and none needs to be told by an abort
        raise Refused(decided.refused)
    return decided


def told(data: bytes, kind: type[_Told], rank: int) -> _Told:
    """What a rank has said of itself, or for all. Raises DesyncError for what is no `kind`."""
    try:
        return msgspec.msgpack.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:  # the last for settings
        raise DesyncError(f"rank {rank} sent {len(data)} bytes that are no {kind.__name__}: {error}", rank) from None


def _decide(ranks: Sequence[Capabilities], files: ModelFiles) -> Agreement:
    try:
        proposal = propose(ranks, files)
        check_memory(proposal, ranks)
    except RingLMError as error:
        return Agreement(Settings(), None, str(error))
    return Agreement(proposal.settings, proposal.plan, led=len({rank.hardware for rank in ranks}) > 1)


def propose(ranks: Sequence[Capabilities], files: ModelFiles) -> Proposal:
    """What these ranks would do, whether or not they have memory for it. The cache is for `max_seqs` sequences of the
    whole context, or for what there is memory for, but for one at least."""
    sizes = read_config(files.config, files.name)
    settings = agree(ranks, sizes.context)
    assert settings.context is not None
    assert settings.max_seqs is not None
    plan = plan_shards(sizes, len(ranks), settings.split)
    devices = [rank.device for rank in ranks]
    held = holdings(files, plan, devices, dtype=settings.dtype, bits=BITS[settings.quant])
    whole = blocks_for(settings.context)
    room = free_blocks(held, [rank.memory for rank in ranks])
    blocks = max(whole, min(settings.max_seqs * whole, room))
    return Proposal(msgspec.structs.replace(settings, blocks=blocks), plan, held)


def check_memory(proposal: Proposal, ranks: Sequence[Capabilities]) -> None:
    """Raises UnfitError, with the arithmetic, for ranks whose memory is too small."""
    settings = proposal.settings
    assert settings.blocks is not None
    memory = [rank.memory for rank in ranks]
    refuse_unfit(proposal.holdings, memory, blocks=settings.blocks, quant=settings.quant)


def agree(ranks: Sequence[Capabilities], model_context: int) -> Settings:
    """The settings of the ring, complete but for `blocks`. Raises ConfigError when a daemon was told otherwise."""
    ours = ranks[0].settings
    for daemon in ranks[1:]:
        check_daemon(daemon, ours)
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


def check_daemon(daemon: Capabilities, ours: Settings) -> None:
    """Raises ConfigError for a daemon that was started with another setting than rank 0, `ours`."""
    default = Settings()
    who = f"rank {daemon.rank}" if daemon.rank >= 0 else "the rank that joins"
    for name in Settings.__struct_fields__:
        theirs, mine = getattr(daemon.settings, name), getattr(ours, name)
        if theirs not in (getattr(default, name), mine):
            raise ConfigError(
                f"{who} was started with {name} {theirs} and rank 0 with "
                f"{'none given' if mine is None else mine}; leave it out on {who}, or give both the same."
            )
