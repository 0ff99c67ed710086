"""A step message as a batch, and the check that it is one this rank can run. The same on every rank."""

from __future__ import annotations

import torch

from ringlm.engine.messages import SequenceStep, StepMessage
from ringlm.errors import DesyncError
from ringlm.models.batch import Batch


def batch_of(message: StepMessage, device: torch.device) -> Batch:
    """The tokens of all sequences laid end to end, and the rows whose logits are wanted.

    `truncate` needs nothing here: a sequence's positions from `start` on are written over, and none beyond
    the tokens of the step is read.
    """
    wanted: list[int] = []
    offset = 0
    for part in message.sequences:
        wanted += [offset + index for index in part.wanted]
        offset += len(part.tokens)
    return Batch.of([(part.tokens, part.start, part.blocks) for part in message.sequences], wanted, device)


def check(message: StepMessage, *, context: int, blocks: int, block: int, vocabulary: int) -> None:
    """DesyncError unless a model for `context` positions can run it with a cache of `blocks` blocks of `block`
    positions."""
    if not message.sequences or message.candidates < 0:
        raise _malformed(message, f"{len(message.sequences)} sequences and {message.candidates} candidates")
    for part in message.sequences:
        end = part.start + len(part.tokens)
        if not part.tokens or part.start < 0 or end > context:
            raise _malformed(message, f"positions {part.start} to {end} of {context}", part)
        if min(part.tokens) < 0 or max(part.tokens) >= vocabulary:
            raise _malformed(message, f"token ids outside 0 to {vocabulary - 1}", part)
        if end > len(part.blocks) * block or min(part.blocks) < 0 or max(part.blocks) >= blocks:
            raise _malformed(message, f"positions up to {end} in cache blocks {part.blocks} of {blocks}", part)
        if any(not 0 <= index < len(part.tokens) for index in part.wanted):
            raise _malformed(message, f"logits of {part.wanted} of {len(part.tokens)} tokens", part)


def _malformed(message: StepMessage, what: str, part: SequenceStep | None = None) -> DesyncError:
    whose = f" for request {part.id}" if part else ""
    return DesyncError(f"rank 0 sent a step {message.step} that cannot be run: {what}{whose}", 0)
