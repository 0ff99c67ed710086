from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.engine.logits import best, merge, pack, pick, pick_on_device, pick_on_host, unpack
from ringlm.errors import DesyncError

few_values = st.sampled_from([-np.inf, -1.5, -0.0, 0.0, 1.0, 2.0])
rows = st.lists(few_values, min_size=1, max_size=40).map(lambda row: np.array(row, np.float32))


def in_order(row: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


@given(rows, st.integers(1, 50))
def test_best_is_in_order_whatever_is_equal(row: np.ndarray, k: int) -> None:
    assert best(row, k).tolist() == in_order(row, k)


@given(rows, st.integers(1, 50))
@settings(max_examples=50)
def test_host_and_device_pick_alike(row: np.ndarray, k: int) -> None:
    k = min(k, row.size)
    logits = torch.from_numpy(np.stack([row, row[::-1]]))
    values, found = pick_on_host(logits.numpy(), k)
    device_values, device_found = pick_on_device(logits, k)
    assert found.tolist() == device_found.tolist() == [in_order(row, k), in_order(row[::-1], k)]
    assert (values == device_values).all()
    assert (values == np.take_along_axis(logits.numpy(), found, axis=1)).all()


@given(rows, st.integers(1, 50), st.lists(st.integers(0, 40), max_size=3), st.booleans())
@settings(max_examples=50, deadline=None)
def test_candidates_of_shards_are_those_of_the_whole(row: np.ndarray, k: int, cuts: list[int], sums: bool) -> None:
    """Ranks without vocabulary rows included; over the wire and back."""
    edges = [0, *sorted(min(cut, row.size) for cut in cuts), row.size]
    logits = torch.from_numpy(np.stack([row, -row]))
    parts = []
    for rank, (start, stop) in enumerate(pairwise(edges)):
        parts.append(unpack(pack(pick(logits[:, start:stop], k, start, sums)), 2, rank, sums))
    values, ids, log_sums = merge(parts, k)
    assert ids.tolist() == [in_order(row, k), in_order(-row, k)]
    assert (values == np.take_along_axis(logits.numpy(), ids, axis=1)).all()
    if not sums:
        assert log_sums is None
    elif np.isfinite(row).all():  # a row with an infinite logit has none
        torch.testing.assert_close(torch.from_numpy(log_sums), logits.logsumexp(dim=1))


@pytest.mark.parametrize("k", [1, 2, 3, 6])
@pytest.mark.parametrize("where", [0, 2, 5])
@pytest.mark.parametrize("others", [0.0, np.inf])
def test_a_nan_is_not_lost(k: int, where: int, others: float) -> None:
    row = np.full(6, others, np.float32)
    row[where] = np.nan
    logits = torch.from_numpy(row[None])
    for values in (
        pick_on_host(logits.numpy(), k)[0],
        pick_on_device(logits, k)[0],
        merge([pick(logits[:, :3], k, 0), pick(logits[:, 3:], k, 3)], k).values,
    ):
        assert np.isnan(values[0, 0]) or values[0, 0] == np.inf


@pytest.mark.parametrize(("size", "log_sums"), [(1, False), (7, False), (9, False), (24, False), (16, True), (4, True)])
def test_bytes_that_are_no_candidates(size: int, log_sums: bool) -> None:
    with pytest.raises(DesyncError, match=f"rank 1 sent {size} bytes") as caught:
        unpack(bytes(size), 2, 1, log_sums)
    assert caught.value.rank == 1
