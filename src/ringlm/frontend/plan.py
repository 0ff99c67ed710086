"""`ringlm plan`: who would hold what, and whether it fits, from the model's headers alone. No torch, no ring."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from ringlm.cluster.agreement import Capabilities, Proposal, check_memory, fast_dtypes, propose
from ringlm.cluster.memory import Memory, fits, host_memory, size
from ringlm.cluster.settings import Settings
from ringlm.errors import ConfigError
from ringlm.frontend import console
from ringlm.frontend.command_options import PlanOptions
from ringlm.frontend.model import resolve
from ringlm.frontend.options import split_weights
from ringlm.models.sizes import BLOCK
from ringlm.parallel.shard import RankShard
from ringlm.weights.files import ModelFiles, open_model

_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


def plan(options: PlanOptions) -> None:
    """The whole command. Raises, after the table, what loading would refuse."""
    if options.world_size < 1:
        raise ConfigError(f"--world-size is {options.world_size}; it must be 1 or more.")
    if options.device not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"--device {options.device} is not known; choose cpu, cuda or mps.")
    settings = Settings(
        dtype=options.dtype,
        quant=options.quant,
        split=None if options.split is None else split_weights(options.split),
        context=options.context,
        max_seqs=options.max_seqs,
    )
    memory = _memory(options.memory, options.world_size)
    model = resolve(options.model, options.format)
    files = open_model(model.path, options.adapter)
    dtypes = fast_dtypes(options.device, options.quant)
    ranks = [Capabilities(rank, options.device, dtypes, settings, memory[rank]) for rank in range(options.world_size)]
    proposal = propose(ranks, files)
    refused = None
    try:
        check_memory(proposal, ranks)
    except ConfigError as error:
        refused = error
    result = summary(files, proposal, memory) | {"refused": None if refused is None else str(refused)}
    if options.json:
        import json

        print(json.dumps(result), flush=True)
    else:
        _show(result, together=options.memory is None and options.world_size > 1)
    if refused is not None:
        raise refused


def summary(files: ModelFiles, proposal: Proposal, memory: list[Memory]) -> dict[str, Any]:
    """The JSON object; ranges are [first, behind the last]."""
    settings, plan, holdings = proposal
    assert settings.blocks is not None
    fit = fits(holdings, memory, settings.blocks)
    return {
        "model": files.name,
        "adapter": files.adapter_name,
        "world_size": plan.world_size,
        "dtype": settings.dtype,
        "quant": settings.quant,
        "context": settings.context,
        "max_seqs": settings.max_seqs,
        "cache_tokens": settings.blocks * BLOCK,
        "ranks": [
            {
                "rank": rank,
                **msgspec.to_builtins(shard),
                "weights_bytes": holdings[rank].weights,
                "cache_bytes": holdings[rank].block * settings.blocks,
                "total_bytes": holdings[rank].total(settings.blocks),
                "free_bytes": memory[rank].free,
                "fits": fit[rank],
            }
            for rank, shard in enumerate(plan.ranks)
        ],
    }


def _memory(given: str | None, world_size: int) -> list[Memory]:
    """By rank: what --memory says, each rank on a machine of its own; else all of them share this machine's."""
    if given is None:
        return [host_memory()] * world_size
    parts = given.split(",")
    if len(parts) == 1:
        parts *= world_size
    if len(parts) != world_size:
        raise ConfigError(
            f"--memory has {len(parts)} sizes for world size {world_size}; give one a rank, or one for all."
        )
    return [Memory(str(rank), _bytes(part)) for rank, part in enumerate(parts)]


def _bytes(text: str) -> int:
    try:
        nbytes = float(text[:-1]) * _UNITS[text[-1:].upper()]
    except (ValueError, KeyError):
        nbytes = -1
    if not 0 <= nbytes < math.inf:
        raise ConfigError(f"--memory holds '{text}'; write sizes such as 16G or 800M.")
    return int(nbytes)


def _show(result: dict[str, Any], together: bool) -> None:
    """A line a rank: how many of each it has, and bytes; `together` when all use one memory."""
    fields = [field for field in RankShard.__struct_fields__ if field != "layers"]
    counts = [field for field in fields if any(rank[field][1] for rank in result["ranks"])]  # most have no experts
    rows = [
        [str(rank["rank"])]
        + [f"{rank[field][1] - rank[field][0]:,}" for field in counts]
        + [size(rank[f"{what}_bytes"]) for what in ("weights", "cache", "total", "free")]
        + ["yes" if rank["fits"] else "no"]
        for rank in result["ranks"]
    ]
    weights = result["dtype"] if result["quant"] == "none" else f"{result['quant']} weights"
    sequences = "1 sequence" if result["max_seqs"] == 1 else f"{result['max_seqs']} sequences, each"
    cache = f"cache in {result['dtype']} for {result['cache_tokens']:,} tokens"
    model = result["model"] if result["adapter"] is None else f"{result['model']} with {result['adapter']}"
    title = f"{model}, {weights}, {cache} (at most {sequences} of {result['context']:,})"
    names = [field.replace("_", " ") for field in counts]
    console.table(title, ["rank", *names, "weights", "cache", "sum", "free", "fits"], rows)
    if together:
        console.write("All ranks use this machine's memory; --memory 16G,24G tells what others have.\n")
