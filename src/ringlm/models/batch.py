"""What a model computes in one step: tokens of several sequences, laid end to end. Knows nothing of
requests or messages; the engine builds it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """One sequence's part of a batch: rows [offset, offset + length) are its positions [start, start + length),
    and its keys and values lie in the cache blocks `blocks`, in order."""

    offset: int
    length: int
    start: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """T tokens of some sequences, and the W rows among them whose logits are wanted.

    The last layer may leave all rows but `kept` alone once it has their keys and values: the last of each span, whose
    hidden state somebody may ask for, and those wanted.
    """

    tokens: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64, each within its own sequence
    spans: tuple[Span, ...]
    wanted: Tensor  # (W,) int64, rows of T
    kept: Tensor | None  # int64, rows of T in order; None: all

    @staticmethod
    def of(
        pieces: Iterable[tuple[Sequence[int], int, Sequence[int]]],
        wanted: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> Batch:
        """The batch of `pieces`, each (token ids, position of the first, cache blocks); `wanted` are rows of
        the pieces laid end to end."""
        tokens: list[int] = []
        positions: list[int] = []
        spans: list[Span] = []
        for ids, start, blocks in pieces:
            spans.append(Span(len(tokens), len(ids), start, tuple(blocks)))
            tokens.extend(ids)
            positions.extend(range(start, start + len(ids)))
        kept = None
        if len(tokens) > len(spans):
            rows = sorted({*(span.offset + span.length - 1 for span in spans), *wanted})
            kept = torch.tensor(rows, dtype=torch.int64, device=device)
        return Batch(
            tokens=torch.tensor(tokens, dtype=torch.int64, device=device),
            positions=torch.tensor(positions, dtype=torch.int64, device=device),
            spans=tuple(spans),
            wanted=torch.tensor(wanted, dtype=torch.int64, device=device),
            kept=kept,
        )
