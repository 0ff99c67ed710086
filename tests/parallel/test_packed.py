"""Packed matrices: their products equal those of the weights that the codes stand for, at every size and cut."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringlm.parallel.kernels.choice import NEVER
from ringlm.parallel.kernels.instructions import ROWS
from ringlm.parallel.kernels.products import FORMS
from ringlm.parallel.packed import PackedMatrix, Segment, Workspace
from ringlm.parallel.packed_device import DeviceSegment
from ringlm.parallel.prologue import Gate, Prologue, RmsNorm

CPU = torch.device("cpu")
AnySegment = TypeVar("AnySegment", Segment, DeviceSegment)
SHAPES: dict[str, Any] = {
    "forms": st.lists(st.sampled_from(FORMS), min_size=1, max_size=3),
    "rows": st.integers(1, 70),
    "columns": st.integers(1, 200),
    "lead": st.integers(0, 31),
    "tokens": st.integers(1, 11),
}


class Sample(NamedTuple):
    """Random rows, packed."""

    bits: int
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None

    @staticmethod
    def random(form: tuple[int, bool], rows: int, blocks: int) -> Sample:
        bits, has_minimum = form
        shape = (rows, blocks)
        if bits == 4:
            codes = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
        else:
            codes = torch.randint(-128, 128, (*shape, 32), dtype=torch.int8)
        return Sample(bits, codes, torch.rand(shape).half(), torch.randn(shape).half() if has_minimum else None)

    def weights(self) -> Tensor:
        """float64 (rows, blocks * 32)."""
        if self.bits == 4:
            values = torch.cat((self.codes & 15, self.codes >> 4), 2).double()
            values = values if self.minimums is not None else values - 8
        else:
            values = self.codes.double()
        values *= self.scales.double().unsqueeze(2)
        if self.minimums is not None:
            values += self.minimums.double().unsqueeze(2)
        return values.flatten(1)


def random_matrix(forms: list[tuple[int, bool]], rows: int, columns: int, lead: int) -> tuple[list[Sample], Tensor]:
    """Segments of these forms, and what they stand for, float64 (rows of all, columns)."""
    samples = [Sample.random(form, rows + index, -(-(lead + columns) // 32)) for index, form in enumerate(forms)]
    return samples, torch.cat([sample.weights() for sample in samples])[:, lead : lead + columns]


def filled(kind: type[AnySegment], sample: Sample, device: torch.device = CPU) -> AnySegment:
    """The sample as a segment of `kind`, filled as tiles come."""
    segment = kind(sample, len(sample.codes), device)
    for first in range(0, len(sample.codes), 24):
        part = [None if t is None else t[first : first + 24] for t in sample[1:]]
        segment.fill(first, Sample(sample.bits, *part))
    return segment


def matrix(samples: list[Sample], columns: int, lead: int, unpack_from: int = NEVER) -> PackedMatrix:
    segments = [filled(Segment, sample) for sample in samples]
    return PackedMatrix(segments, columns, lead, torch.float32, Workspace(unpack_from))


def rounded(x: Tensor, lead: int, blocks: int) -> Tensor:
    """x as the kernel sees it: int8 in blocks of 32, in float64 (tokens, columns)."""
    padded = torch.zeros(len(x), blocks * 32)
    padded[:, lead : lead + x.shape[1]] = x
    grouped = padded.view(len(x), blocks, 32)
    scale = grouped.abs().amax(2, keepdim=True) / 127
    codes = (grouped / scale).nan_to_num().round()
    return (codes.double() * scale.double()).view(len(x), -1)[:, lead : lead + x.shape[1]]


@settings(deadline=None, max_examples=60)
@given(
    **SHAPES,
    seed=st.integers(0, 1000),
)
def test_products_equal_those_of_the_weights(
    forms: list[tuple[int, bool]], rows: int, columns: int, lead: int, tokens: int, seed: int
) -> None:
    torch.manual_seed(seed)
    samples, weights = random_matrix(forms, rows, columns, lead)
    x, bias = torch.randn(tokens, columns), torch.randn(len(weights))
    packed = matrix(samples, columns, lead)
    expected = rounded(x, lead, -(-(lead + columns) // 32)) @ weights.T + bias.double()
    # Half-way cases may be rounded otherwise: one code of x is 1/127 of its block's largest.
    torch.testing.assert_close(packed(x, bias).double(), expected, rtol=2e-3, atol=2e-2 * weights.abs().max().item())
    close = (packed(x, bias).double() - expected).abs() < 1e-4 * expected.abs().max()
    assert close.double().mean() > 0.9
    indices = torch.randint(0, len(weights), (tokens,))
    torch.testing.assert_close(packed.rows(indices).double(), weights[indices], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_codes_do_not_overflow(form: tuple[int, bool]) -> None:
    sample = Sample.random(form, 8, 4)
    sample.codes.fill_(-128 if form[0] == 8 else 255)
    sample.scales.fill_(1.0)
    weights = sample.weights()
    packed = matrix([sample], 128, 0)
    for x in (torch.ones(1, 128), -torch.ones(5, 128)):
        torch.testing.assert_close(packed(x).double(), x.double() @ weights.T, rtol=1e-5, atol=1e-2)


def test_threads_give_the_same_bits() -> None:
    sample = Sample.random((4, True), 300, 5)
    x = torch.randn(7, 160)
    alone = matrix([sample], 160, 0)(x)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(matrix([sample], 160, 0)(x), alone)
    finally:
        torch.set_num_threads(before)


def test_a_matrix_without_rows_gives_zeros() -> None:
    packed = matrix([Sample.random((4, False), 0, 2)], 64, 0)
    assert packed(torch.randn(3, 64)).shape == (3, 0)
    assert packed.rows(torch.zeros(3, dtype=torch.int64)).tolist() == [[0.0] * 64] * 3


@settings(deadline=None, max_examples=40)
@given(
    **SHAPES,
    tile=st.sampled_from([1, 3000, 1 << 19]),
)
def test_unpacked_products_are_those_of_the_weights_in_bfloat16(
    forms: list[tuple[int, bool]], rows: int, columns: int, lead: int, tokens: int, tile: int
) -> None:
    torch.manual_seed(rows)
    samples, weights = random_matrix(forms, rows, columns, lead)
    x, bias = torch.randn(tokens, columns), torch.randn(len(weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ringlm.parallel.packed._TILE", tile)
        found = matrix(samples, columns, lead, unpack_from=0)(x, bias)
    exact = x.bfloat16().double() @ weights.float().bfloat16().double().T
    # rounded to bfloat16 once more, as torch's product in that type is
    torch.testing.assert_close(
        found.double(), exact + bias.double(), rtol=2.0**-7, atol=2e-3 * weights.abs().max().item()
    )


@pytest.mark.parametrize("form", FORMS)
def test_unpacking_rounds_as_torch_does(form: tuple[int, bool]) -> None:
    sample = Sample.random(form, 5 * ROWS, 7)
    segment = Segment(sample, 5 * ROWS, CPU)
    segment.fill(0, sample)
    for threads in (1, 3):
        tile = torch.empty(3 * ROWS, 7 * 32, dtype=torch.bfloat16)
        segment.unpack_into(tile, 2, 5, threads)
        assert torch.equal(tile, sample.weights()[2 * ROWS :].float().bfloat16())


@pytest.mark.parametrize(
    "prologue", [RmsNorm(torch.rand(64) + 0.5, 1e-5), Gate(), Gate(gelu=True)], ids=["norm", "silu", "gelu"]
)
def test_both_products_do_what_comes_before_them(prologue: Prologue) -> None:
    sample = Sample.random((8, False), 24, 2)
    x = torch.randn(5, 200)[:, : 64 if isinstance(prologue, RmsNorm) else 128]  # rows that are not side by side
    few, many = (matrix([sample], 64, 0, unpack_from=rows)(x, None, prologue) for rows in (NEVER, 0))
    expected = prologue(x).double() @ sample.weights().T
    for found in (few, many):
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
