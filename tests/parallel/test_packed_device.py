"""Packed matrices as accelerators hold them: by unpacking on the CPU, and by the compiled products where CUDA is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.parallel import packed_device
from ringlm.parallel.kernels.products import FORMS
from ringlm.parallel.linear import ColumnParallel
from ringlm.parallel.packed_device import FEW, DevicePacked, DeviceSegment
from ringlm.parallel.prologue import Gate, RmsNorm
from tests.parallel.test_packed import SHAPES, Sample, filled, random_matrix

CPU = torch.device("cpu")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


def matrix(
    samples: list[Sample], columns: int, lead: int, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> DevicePacked:
    return DevicePacked([filled(DeviceSegment, sample, device) for sample in samples], columns, lead, dtype)


@settings(deadline=None, max_examples=60)
@given(
    **SHAPES,
    tile=st.sampled_from([1, 500, 1 << 24]),
    seed=st.integers(0, 1000),
)
def test_unpacked_products_are_those_of_the_weights(
    forms: list[tuple[int, bool]], rows: int, columns: int, lead: int, tokens: int, tile: int, seed: int
) -> None:
    torch.manual_seed(seed)
    samples, weights = random_matrix(forms, rows, columns, lead)
    x, bias = torch.randn(tokens, columns), torch.randn(len(weights))
    packed = matrix(samples, columns, lead)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_device, "_TILE", tile)
        found = packed(x, bias).double()
    largest = weights.abs().max().item()
    torch.testing.assert_close(found, x.double() @ weights.T + bias.double(), rtol=1e-5, atol=1e-4 * (1 + largest))
    indices = torch.randint(0, len(weights), (tokens,))
    torch.testing.assert_close(packed.rows(indices).double(), weights[indices], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_extreme_codes_are_what_they_are(form: tuple[int, bool]) -> None:
    sample = Sample.random(form, 9, 4)
    for byte in (0, 127, 128, 255):
        sample.codes.view(torch.uint8).fill_(byte)
        packed = matrix([sample], 128, 0)
        torch.testing.assert_close(packed.rows(torch.arange(9)).double(), sample.weights(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_prologues_come_before_the_product_in_the_dtype_of_the_activations(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    samples, weights = random_matrix([(4, True), (8, False)], 40, 50, 7)
    packed, exact = matrix(samples, 50, 7, dtype), weights.to(dtype)
    norm = RmsNorm(torch.randn(50).to(dtype), 1e-5)
    for prologue, width in ((norm, 50), (Gate(), 100), (Gate(gelu=True), 100)):
        x = torch.randn(3, width).to(dtype)
        found = ColumnParallel(packed, None, prologue)(x)
        assert found.dtype is dtype
        torch.testing.assert_close(found, torch.nn.functional.linear(prologue(x), exact))
    rows = packed.rows(torch.tensor([80, 0]))
    assert torch.equal(rows, exact[[80, 0]])


def test_a_matrix_without_rows_gives_zeros() -> None:
    packed = matrix([Sample.random((4, False), 0, 2)], 64, 0)
    assert packed(torch.randn(3, 64)).shape == (3, 0)
    assert packed.rows(torch.zeros(3, dtype=torch.int64)).tolist() == [[0.0] * 64] * 3


def test_a_matrix_without_columns_gives_the_bias() -> None:
    packed = matrix([Sample.random((8, False), 5, 0)], 0, 0)
    bias = torch.randn(5)
    assert torch.equal(packed(torch.empty(3, 0), bias), bias.expand(3, 5))


def test_what_it_holds_is_what_it_was_filled_with() -> None:
    sample = Sample.random((4, True), 20, 3)
    segment = DeviceSegment(sample, 20, CPU)
    segment.fill(0, sample)
    again = DeviceSegment(sample, 20, CPU, segment.tensors())
    assert torch.equal(again.unpack(slice(0, 20), torch.float32).double(), sample.weights())
    assert again.nbytes == 20 * 3 * (16 + 2 + 2)


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_the_compiled_products_are_those_of_the_weights(form: tuple[int, bool], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    other = FORMS[(FORMS.index(form) + 1) % len(FORMS)]
    for rows, columns, lead in ((1, 1, 0), (70, 200, 0), (33, 1500, 21), (515, 2048, 0), (8, 31, 1)):
        samples, weights = random_matrix([form, other], rows, columns, lead)
        packed = matrix(samples, columns, lead, dtype, torch.device("cuda"))
        assert packed._products, "triton does not compile here"
        for tokens in (1, FEW, FEW + 1, 40):
            whole = torch.randn(tokens, columns + 3, device="cuda").to(dtype)
            bias = torch.randn(len(weights), device="cuda").to(dtype)
            for x in (whole[:, 3:], whole[:, :columns].contiguous()):  # rows at odd places, and at even ones
                expected = x.double() @ weights.cuda().T + bias.double()
                size = (x.double().abs() @ weights.cuda().abs().T).amax().item()
                error = (packed(x, bias).double() - expected).abs().max().item()
                assert error <= size * (1e-6 if dtype is torch.float32 else torch.finfo(dtype).eps)
        indices = torch.randint(0, len(weights), (20,), device="cuda")
        assert torch.equal(packed.rows(indices).cpu(), weights[indices.cpu()].float().to(dtype))
