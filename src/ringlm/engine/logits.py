"""Logits on their way to rank 0: whole rows, or only the best of each row. How the best are picked on each
rank, sent, and merged. Knows arrays and bytes, no requests.

"In order" means here: the higher logit first and, of equals, the lower token id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ringlm.errors import DesyncError

Floats = NDArray[np.float32]
Indices = NDArray[np.intp]
_Int = TypeVar("_Int", np.int32, np.intp)
_VALUE, _ID = np.dtype("<f4"), np.dtype("<i4")  # as they travel


class Candidates(NamedTuple):
    """The best k logits of n positions, in order. A row with a NaN among its logits starts with NaN or +inf."""

    values: Floats  # (n, k)
    ids: NDArray[np.int32]  # (n, k)
    log_sums: Floats | None = None  # (n,), of exp(logit) over the vocabulary, where they were asked for


Logits: TypeAlias = Candidates | Floats  # or (n, V), where column i is token i


def select(row: Floats, k: int) -> Indices:
    """Indices of the best `k` of `row` (V,), of all if there are fewer: those above the last by index, then those
    equal to it. None of `row` may be NaN."""
    if k >= row.size:
        return np.arange(row.size)
    last = np.partition(row, row.size - k)[row.size - k]
    above = np.flatnonzero(row > last)
    equal = np.flatnonzero(row == last)[: k - above.size]
    return np.concatenate([above, equal])


def best(row: Floats, k: int) -> Indices:
    """`select`, in order."""
    found = select(row, k)
    return found[np.argsort(-row[found], kind="stable")]


def log_probabilities(row: Floats) -> Floats:
    """The natural logarithms of what the softmax makes of `row` (V,)."""
    below: Floats = row - row.max()
    below -= np.log(np.exp(below).sum())
    return below


def pick(logits: Tensor, k: int, first_id: int, log_sums: bool = False) -> Candidates:
    """The best `k` of each row of float32 `logits` (n, columns), of all if there are fewer; column 0 is token
    `first_id`."""
    k = min(k, logits.shape[1])
    if k == 0:
        found: Indices = np.empty((len(logits), 0), np.intp)
        values: Floats = np.empty((len(logits), 0), np.float32)
    elif logits.is_cpu:
        values, found = pick_on_host(logits.numpy(), k)
    else:
        values, found = pick_on_device(logits, k)
    sums = logits.logsumexp(dim=1).cpu().numpy() if log_sums else None
    return Candidates(values, (found + first_id).astype(np.int32), sums)


def pick_on_host(logits: Floats, k: int) -> tuple[Floats, Indices]:
    """The best `k` of each row and their columns. numpy, since its argmax is fifteen times faster than torch's."""
    if k == 1:  # argmax takes the first of equals, and both a NaN before anything
        return logits.max(axis=1, keepdims=True), logits.argmax(axis=1, keepdims=True)
    found = np.stack([_best_or_nan(row, k) for row in logits])
    return logits[np.arange(len(logits))[:, None], found], found


def pick_on_device(logits: Tensor, k: int) -> tuple[Floats, Indices]:
    """The same without moving whole rows off the device.

    topk promises nothing about equals. So one more than needed is asked for: where it equals the last one
    needed, the row itself decides.
    """
    top, columns = logits.topk(min(k + 1, logits.shape[1]), dim=1)
    values, found = in_order(top.cpu().numpy(), columns.cpu().numpy())
    for row in np.flatnonzero((values[:, k - 1 : k] == values[:, k : k + 1]).any(axis=1)):
        found[row, :k] = _best_or_nan(logits[row].cpu().numpy(), k)
    return values[:, :k], found[:, :k]


def _best_or_nan(row: Floats, k: int) -> Indices:
    top = int(row.argmax())
    return np.full(k, top) if np.isnan(row[top]) else best(row, k)


def in_order(values: Floats, ids: NDArray[_Int]) -> tuple[Floats, NDArray[_Int]]:
    """Both (n, k), each row sorted in order; NaN counts as +inf."""
    order = np.lexsort((ids, -np.where(np.isnan(values), np.inf, values)), axis=1)
    rows = np.arange(len(values))[:, None]
    return values[rows, order], ids[rows, order]


def pack(candidates: Candidates) -> bytes:
    """All values, then all ids, row by row, then the log sums if there are any, as little-endian float32 and int32."""
    values, ids, log_sums = candidates
    data = values.astype(_VALUE).tobytes() + ids.astype(_ID).tobytes()
    return data if log_sums is None else data + log_sums.astype(_VALUE).tobytes()


def unpack(data: bytes, n: int, rank: int, log_sums: bool = False) -> Candidates:
    """What `pack` made of `n` rows on `rank`; DesyncError for bytes that cannot be that."""
    sums = n * _VALUE.itemsize if log_sums else 0
    count, rest = divmod(len(data) - sums, _VALUE.itemsize + _ID.itemsize)
    if count < 0 or rest or count % n:
        raise DesyncError(f"rank {rank} sent {len(data)} bytes of candidates for {n} positions", rank)
    values = np.frombuffer(data, _VALUE, count).reshape(n, -1)
    ids = np.frombuffer(data, _ID, count, offset=values.nbytes).reshape(n, -1)
    return Candidates(values, ids, np.frombuffer(data, _VALUE, offset=len(data) - sums) if log_sums else None)


def merge(parts: Sequence[Candidates], k: int) -> Candidates:
    """The best `k` of all ranks' candidates, given in rank order, which is that of their token ids."""
    values, ids = (np.concatenate([part[index] for part in parts], axis=1) for index in range(2))
    sums, log_sums = [part.log_sums for part in parts if part.log_sums is not None], None
    if sums:
        with np.errstate(invalid="ignore"):  # damaged logits are told from their values
            log_sums = np.logaddexp.reduce(sums, axis=0)
    if k == 1:  # greedy, so in every step: a third of the time of sorting
        rows, first = np.arange(len(values))[:, None], values.argmax(axis=1)[:, None]
        return Candidates(values[rows, first], ids[rows, first], log_sums)
    values, ids = in_order(values, ids)
    return Candidates(values[:, :k], ids[:, :k], log_sums)
