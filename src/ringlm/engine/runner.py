"""Runs one step message: the same forward on every rank, and the wanted logits to rank 0. Knows nothing of
requests, and not who sent the message."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ringlm.engine.logits import Floats, Logits, merge, pack, pick, unpack
from ringlm.engine.messages import StepMessage
from ringlm.engine.step import batch_of
from ringlm.models.cache import KVCache
from ringlm.models.causal_lm import CausalLM
from ringlm.parallel.communicator import Communicator


class Found(NamedTuple):
    """What a step gives on rank 0: the logits of the wanted positions, in order, and hidden states (rows, hidden_size);
    None where none were wanted."""

    logits: Logits | None
    states: Floats | None


class Runner:
    """A rank's part of the model, its cache, and its links."""

    def __init__(self, model: CausalLM, cache: KVCache, comm: Communicator) -> None:
        self.model = model
        self.cache = cache
        self.comm = comm
        self.computed_s = 0.0  # within steps, and outside of collectives

    def run(self, message: StepMessage, rows: Sequence[int] = ()) -> Found:
        """Run the step; on rank 0 `rows` of its tokens, laid end to end, are those whose hidden states are asked for.
        Other ranks find nothing."""
        begun_s = time.perf_counter() - self.comm.seconds
        batch = batch_of(message, self.model.device)
        if not rows:
            found = Found(self._gather(message, self.model.forward(batch, self.cache)), None)
        else:
            local, states = self.model.forward_states(batch, self.cache, rows)
            found = Found(self._gather(message, local), states.cpu().numpy())
        self.computed_s += time.perf_counter() - self.comm.seconds - begun_s
        return found

    def _gather(self, message: StepMessage, local: Tensor) -> Logits | None:
        """On rank 0 what all ranks' `local` (wanted, this rank's vocabulary rows) are together."""
        if local.shape[0] == 0:
            return None
        if message.candidates:
            return self._gather_candidates(local, message.candidates, message.log_sums)
        return self._gather_all(local)

    def _gather_candidates(self, local: Tensor, k: int, log_sums: bool) -> Logits | None:
        candidates = pick(local, k, self.model.shard.vocabulary.start, log_sums)
        if self.comm.world_size == 1:
            return candidates
        parts = self.comm.gather_bytes(pack(candidates))
        if parts is None:
            return None
        return merge([unpack(data, len(local), rank, log_sums) for rank, data in enumerate(parts)], k)

    def _gather_all(self, local: Tensor) -> Logits | None:
        parts = self.comm.gather(local.contiguous())
        if parts is None:
            return None
        logits = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (wanted, vocabulary)
        return logits.cpu().numpy()
