"""A language model's part on one rank: embed, blocks, head. Families bring the blocks.

Communication is the embedding's reduction, and what the blocks do: two reductions each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ringlm.models.attention import AttentionStep
from ringlm.models.batch import Batch
from ringlm.models.cache import KVCache
from ringlm.models.config import ModelConfig
from ringlm.models.kinds import AttentionKind
from ringlm.models.rope import RopeTable
from ringlm.models.sizes import BLOCK
from ringlm.parallel.linear import ColumnParallel, VocabularyParallel
from ringlm.parallel.shard import RankShard


class Block(Protocol):
    """One layer."""

    def forward(self, hidden: Tensor, step: AttentionStep, kept: Tensor | None = None) -> Tensor:
        """Adds to `hidden`, float32 (T, hidden_size), in place and returns it; or, in the end, a copy of its rows
        `kept`."""
        ...


class CausalLM:
    """This rank's shard of a model. `nbytes` are its weights'; every rank calls `forward` with the same batches."""

    def __init__(
        self,
        config: ModelConfig,
        shard: RankShard,
        attention: Sequence[tuple[AttentionKind, RopeTable]],
        embedding: VocabularyParallel,
        blocks: Sequence[Block],
        head: ColumnParallel,
        nbytes: int,
    ) -> None:
        self.config, self.shard, self.nbytes = config, shard, nbytes
        self._attention, self._embedding, self._blocks, self._head = attention, embedding, blocks, head
        self._angles = attention[0][1].cos  # of the activations' dtype and device
        scale = torch.tensor(config.embedding_scale).to(self._angles.dtype)  # rounded as transformers does
        self._embedding_scale = None if config.embedding_scale == 1 else scale.item()

    @property
    def device(self) -> torch.device:
        """Where the shard is, and where batches belong."""
        return self._angles.device

    def new_cache(self, blocks: int, block: int = BLOCK) -> KVCache:
        """An empty cache of `blocks` blocks of `block` positions."""
        return KVCache(
            blocks=blocks,
            block=block,
            layers=len(self.shard.layers),
            kv_heads=len(self.shard.kv_heads),
            head_dim=self.config.head_dim,
            dtype=self._angles.dtype,
            device=self._angles.device,
        )

    @torch.inference_mode()
    def forward(self, batch: Batch, cache: KVCache) -> Tensor:
        """Logits of the wanted rows over this rank's vocabulary, float32 (W, vocabulary rows); the cache grows by
        the batch's positions. Raises IndexError for positions outside the cache."""
        return self._logits(self._hidden(batch, cache)[_among_kept(batch, batch.wanted)])

    @torch.inference_mode()
    def forward_states(self, batch: Batch, cache: KVCache, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`forward`, and the hidden states of the batch's `rows`, each the last of a span, after the last norm, float32
        (rows, hidden_size). It communicates as `forward` does."""
        hidden, norm = self._hidden(batch, cache), self._head.prologue
        assert norm is not None
        asked = _among_kept(batch, torch.tensor(rows, device=self.device))
        return self._logits(hidden[_among_kept(batch, batch.wanted)]), norm(hidden[asked]).float()

    def _hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        """What the layers make of the batch's kept rows, float32 (kept, hidden_size)."""
        embedded = self._embedding(batch.tokens)  # (T, hidden_size)
        if self._embedding_scale is not None:
            embedded.mul_(self._embedding_scale)
        # The sum of all layers is kept in float32, whatever the products' dtype: rounded after each of them, it would
        # hold most of the error of a model in bfloat16, the more so the more ranks there are (docs/performance.md).
        hidden = embedded.float()
        step = AttentionStep(batch, cache, self._attention, len(self.shard.query_heads), len(self.shard.kv_heads))
        for block in self._blocks[:-1]:
            block.forward(hidden, step)
        return self._blocks[-1].forward(hidden, step, batch.kept)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = self._head(hidden).float()
        cap = self.config.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _among_kept(batch: Batch, rows: Tensor) -> Tensor:
    """Where those of the batch's rows lie among the kept ones."""
    return rows if batch.kept is None else torch.searchsorted(batch.kept, rows)
