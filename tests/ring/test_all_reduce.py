"""all_reduce: the sum in rank order, rounded once, bit for bit the same on every rank."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringlm.ring import Ring
from tests.ring.helpers import DTYPES, contribution, each, expected_sum, thread_ring

SEGMENT_BYTES = 64
DIRECT_BYTES = 32
WORLD_SIZES = range(1, 9)


@pytest.fixture(scope="module", params=WORLD_SIZES)
def rings(request: pytest.FixtureRequest) -> Iterator[list[Ring]]:
    with thread_ring(request.param, options={"segment_bytes": SEGMENT_BYTES, "direct_bytes": DIRECT_BYTES}) as rings:
        yield rings


@st.composite
def lengths(draw: st.DrawFn, world_size: int, item: int) -> int:
    """Around every boundary: nothing, a chunk a rank, the direct size, segments, chunks of segments."""
    segment = SEGMENT_BYTES // item
    edges = (
        0,
        world_size,
        DIRECT_BYTES // item,
        segment,
        2 * segment,
        4 * segment,
        segment * world_size,
        3 * segment * world_size,
    )
    return max(0, draw(st.sampled_from(edges)) + draw(st.integers(-2, 2)))


def laid_out(flat: torch.Tensor, layout: str) -> torch.Tensor:
    """The same elements in the same order, another way in memory."""
    if layout == "every second":
        return torch.stack((flat, flat), dim=1)[:, 0]
    if layout == "transposed":
        return flat.view(-1, 2).t().contiguous().t() if len(flat) % 2 == 0 else laid_out(flat, "every second")
    if layout == "matrix":
        return flat.view(1, -1, 1)
    if layout == "offset":
        return torch.cat((flat[:0].new_zeros(1), flat))[1:]
    return flat.clone()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_length_dtype_and_layout(rings: list[Ring], data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    length = data.draw(lengths(len(rings), dtype.itemsize))
    layout = data.draw(st.sampled_from(("flat", "every second", "transposed", "matrix", "offset")))
    seed = data.draw(st.integers(0, 1000))

    def work(ring: Ring) -> torch.Tensor:
        tensor = laid_out(contribution(seed, ring.rank, length, dtype), layout)
        assert ring.all_reduce(tensor) is tensor
        return tensor.reshape(-1)

    expected = expected_sum(seed, len(rings), length, dtype)
    for result in each(rings, work):
        assert torch.equal(result, expected)


def test_scalars_gradients_and_infinities(rings: list[Ring]) -> None:
    def work(ring: Ring) -> tuple[float, list[float], list[float]]:
        scalar = ring.all_reduce(torch.tensor(1.0)).item()
        weights = torch.ones(3, requires_grad=True)
        ring.all_reduce(weights)
        scattered = torch.ones(4, 3).t().requires_grad_()
        ring.all_reduce(scattered)
        assert scattered.detach().eq(ring.world_size).all()
        wild = torch.tensor([float("inf"), 3e38, -0.0])
        return scalar, weights.tolist(), ring.all_reduce(wild).tolist()

    n = len(rings)
    for scalar, weights, wild in each(rings, work):
        assert (scalar, weights) == (n, [n] * 3)
        assert wild == [float("inf"), pytest.approx(3e38) if n == 1 else float("inf"), 0.0]


def test_many_in_a_row_of_all_sizes(rings: list[Ring]) -> None:
    """Ranks run ahead of each other; nothing of one collective leaks into the next."""
    sizes = [1, 500, 3, 17, 0, 64, 1000, 2] * 5

    def work(ring: Ring) -> list[torch.Tensor]:
        return [ring.all_reduce(contribution(i, ring.rank, n, torch.bfloat16)) for i, n in enumerate(sizes)]

    expected = [expected_sum(i, len(rings), n, torch.bfloat16) for i, n in enumerate(sizes)]
    for results in each(rings, work):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_a_dtype_that_is_not_carried_changes_nothing(rings: list[Ring]) -> None:
    def work(ring: Ring) -> float:
        if ring.world_size > 1:
            with pytest.raises(ValueError, match=r"does not carry torch\.uint16; it carries torch\.uint8, "):
                ring.all_reduce(torch.zeros(3, dtype=torch.uint16))
        return ring.all_reduce(torch.ones(1)).item()

    assert each(rings, work) == [len(rings)] * len(rings)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_with_the_usual_segments(world_size: int) -> None:
    """Megabytes: socket buffers fill, and both directions have to move at once."""
    lengths = [1536, 8192, 8193, 131_072, 131_073, 2_500_000 if world_size == 2 else 700_001]
    with thread_ring(world_size) as rings:

        def work(ring: Ring) -> list[torch.Tensor]:
            return [ring.all_reduce(contribution(n, ring.rank, n, torch.float32)) for n in lengths]

        for results in each(rings, work):
            for length, result in zip(lengths, results, strict=True):
                assert torch.equal(result, expected_sum(length, world_size, length, torch.float32))
