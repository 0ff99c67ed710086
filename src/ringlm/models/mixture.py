"""A mixture of experts in place of a layer's MLP, as files have it, and how it is split."""

from __future__ import annotations

from typing import Final

from ringlm.models.layers import GATES, LayerBuilder
from ringlm.parallel.experts import MixtureOfExperts, Router
from ringlm.parallel.linear import column_parallel, row_parallel
from ringlm.parallel.prologue import RmsNorm

_MIXTRAL: Final = ("block_sparse_moe.", "w1", "w3", "w2")  # before the names, and an expert's gate, up and down
_OTHERS: Final = ("mlp.", "gate_proj", "up_proj", "down_proj")  # also Mixtral's in GGUF


def has_mixture(layer: LayerBuilder) -> bool:
    """Whether this layer has one, or an MLP as in models without."""
    return layer.config.mixture is not None and layer.layer in layer.config.mixture.layers


def mixture(layer: LayerBuilder, before: RmsNorm) -> MixtureOfExperts:
    """The layer's mixture, with a norm before it. Each rank has the same columns of every expert, and all of the
    router."""
    config, load, found = layer.config, layer.load, layer.config.mixture
    assert found is not None
    router = f"{layer.prefix}{_MIXTRAL[0]}gate"
    where, gate, up, down = _MIXTRAL if load.has(f"{router}.weight") else _OTHERS
    columns = (found.columns, layer.shard.expert_columns)  # (whole, this rank's)
    specs = []
    for expert in range(found.experts):
        prefix = f"{layer.prefix}{where}experts.{expert}."
        inner = column_parallel(prefix, config.hidden_size, False, **{gate: columns, up: columns})
        outer = row_parallel(f"{prefix}{down}", (config.hidden_size, columns[0]), columns[1], False)
        specs.append((inner, outer))
    matrix = load.whole(f"{layer.prefix}{where}gate", (found.experts, config.hidden_size))
    experts = load.experts(specs, GATES[config.activation])
    return MixtureOfExperts(before, Router(matrix, found.chosen, found.normalized), experts, load.comm, load.led)
