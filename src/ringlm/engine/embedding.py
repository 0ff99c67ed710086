"""The vector of a text: the model's hidden state after its last token. Knows no model."""

from __future__ import annotations

from collections.abc import Sequence as Several
from typing import NamedTuple

import numpy as np

from ringlm.engine.logits import Floats
from ringlm.engine.sequence import Sequence
from ringlm.errors import RequestError


class Vector(NamedTuple):
    """The embedding of request `id`, which has ended: `values` (hidden_size,) of length 1."""

    id: int
    values: Floats


def embed(states: Floats | None, sequences: Several[Sequence]) -> list[Vector | RequestError]:
    """The embedding of each sequence from its row of `states` (None: no rows); an error where it has no direction."""
    if states is None:
        return []
    lengths: list[float] = np.linalg.norm(states, axis=1).tolist()
    return [
        Vector(sequence.id, state / length) if 0.0 < length < np.inf else _unusable(sequence, length)
        for sequence, state, length in zip(sequences, states, lengths, strict=True)
    ]


def _unusable(sequence: Sequence, length: float) -> RequestError:
    return RequestError(
        f"The model's last hidden state of request {sequence.id} is of length {length}: its weights are damaged, or "
        "--dtype overflows (try --dtype float32)."
    )
