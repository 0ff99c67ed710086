"""A model that runs transformers' modelling code: our layers and our attention as its modules. Knows no family and no
plan; fallback.py puts the modules in.

The batch's sequences lie end to end in one row, as everywhere here; each token brings its position along, and only
attention knows where a sequence ends. transformers' caches and masks are not used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ringlm.errors import ModelError
from ringlm.models.attention import AttentionStep
from ringlm.models.batch import Batch
from ringlm.models.cache import KVCache
from ringlm.models.causal_lm import CausalLM
from ringlm.models.config import ModelConfig
from ringlm.models.kinds import NO_ROPE, AttentionKind
from ringlm.models.rope import RopeTable
from ringlm.parallel.linear import ColumnParallel, RowParallel, VocabularyParallel
from ringlm.parallel.shard import RankShard


class Column(nn.Module):
    """A column-parallel layer."""

    def __init__(self, layer: ColumnParallel) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, in) to (1, T, this rank's outputs)."""
        return self.layer(x[0])[None]


class Row(nn.Module):
    """A row-parallel layer; transformers' code adds to the residual itself."""

    def __init__(self, layer: RowParallel) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """(1, T, this rank's inputs) to (1, T, out), summed over ranks."""
        total = self.layer.comm.all_reduce(self.layer.matrix(x[0]))
        return (total if self.layer.bias is None else total.add_(self.layer.bias))[None]


class Embedding(nn.Module):
    """The embedding, by vocabulary."""

    def __init__(self, layer: VocabularyParallel) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (1, T) to (1, T, hidden_size)."""
        return self.layer(tokens[0])[None]


class Attending:
    """The attention of all layers in the step at hand. Queries and keys come turned, so that our rope turns nothing."""

    def __init__(self, shard: RankShard, rope: RopeTable) -> None:
        self.rope = rope
        self._heads = len(shard.query_heads), len(shard.kv_heads)
        self._steps: dict[AttentionKind, AttentionStep] = {}
        self._step: Callable[[AttentionKind], AttentionStep]

    def begin(self, batch: Batch, cache: KVCache) -> None:
        """A forward begins."""
        self._steps = {}
        self._step = lambda kind: AttentionStep(batch, cache, [(kind, self.rope)], *self._heads)

    def __call__(self, layer: int, kind: AttentionKind, qkv: Tensor) -> Tensor:
        """As AttentionStep, with the kind itself."""
        if kind not in self._steps:
            self._steps[kind] = self._step(kind)
        return self._steps[kind](layer, 0, qkv)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """transformers' attention function: query (1, heads, T, size), key and value (1, kv_heads, T, size) of the new
    tokens to (1, T, heads, size)."""
    if attention_mask is not None or s_aux is not None or not getattr(module, "is_causal", True):
        name = type(module).__name__
        raise ModelError(f"layer {module.layer_idx}: {name} attends in a way of its own; the model does not run here.")
    kind = AttentionKind(NO_ROPE, scaling, sliding_window, softcap)
    qkv = torch.cat([heads[0].transpose(0, 1) for heads in (query, key, value)], dim=1)
    mixed = module.ringlm(module.layer_idx, kind, qkv)
    return mixed.view(1, qkv.shape[0], query.shape[1], -1), None


class TransformersLM(CausalLM):
    """This rank's shard of a model whose forward is transformers'."""

    def __init__(
        self,
        config: ModelConfig,
        shard: RankShard,
        attending: Attending,
        embedding: VocabularyParallel,
        head: ColumnParallel,
        model: Any,
        nbytes: int,
    ) -> None:
        kinds = [(config.attention[0], attending.rope)]
        super().__init__(config, shard, kinds, embedding, (), head, nbytes)
        self._model, self._attending = model, attending

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """As CausalLM's; scales and caps of logits are the family's own."""
        logits: Tensor = self._run(batch, cache).logits[0].float()
        return logits

    @torch.inference_mode()
    def forward_states(self, batch: Batch, cache: KVCache, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """As CausalLM's."""
        found = self._run(batch, cache, output_hidden_states=True)
        return found.logits[0].float(), found.hidden_states[-1][0, list(rows)].float()

    def _run(self, batch: Batch, cache: KVCache, **asked: bool) -> Any:
        self._attending.begin(batch, cache)
        return self._model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            use_cache=False,
            logits_to_keep=batch.wanted,
            **asked,
        )
