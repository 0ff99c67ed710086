"""Which module holds which family; imported when a model asks for it. Each has `build(config, shard, load)`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ringlm.models.causal_lm import CausalLM
    from ringlm.models.config import ModelConfig
    from ringlm.models.loader import ShardLoader
    from ringlm.parallel.shard import RankShard

FAMILIES: Final[Mapping[str, str]] = {  # config.json's "architectures": module
    "LlamaForCausalLM": "ringlm.models.llama",
}


def builder(architecture: str) -> Callable[[ModelConfig, RankShard, ShardLoader], CausalLM]:
    """The function that builds one rank's part of a model of `architecture`, one of FAMILIES."""
    build: Callable[[ModelConfig, RankShard, ShardLoader], CausalLM]
    build = importlib.import_module(FAMILIES[architecture]).build
    return build
