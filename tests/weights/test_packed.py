"""Quantizing floats: how near, that no better choice is at hand nearby, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ringlm.weights.packed import Packed, quantize, unpack

form = pytest.mark.parametrize("bits", [4, 8])


def relative_error(weight: Tensor, packed: Packed) -> float:
    """Squared, of the whole matrix."""
    return float((unpack(packed)[:, : weight.shape[1]] - weight).square().sum() / weight.square().sum())


def gaussian(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.02


def heavy_tailed(rows: int, columns: int) -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return torch.from_numpy(np.random.default_rng(0).standard_t(3, (rows, columns)).astype(np.float32)) * 0.02


def rounded_plainly(weight: Tensor) -> Tensor:
    """What codes that span a block's range give."""
    x = weight.view(-1, 32)
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    scale = (high - low) / 15
    return (((x - low) / scale).round() * scale + low).view_as(weight)


def test_unpack_by_hand() -> None:
    scales = torch.tensor([[0.5]], dtype=torch.float16)
    minimums = torch.tensor([[-1.0]], dtype=torch.float16)
    quads = (torch.arange(16, dtype=torch.uint8) | 3 << 4).view(1, 1, 16)
    first, second = torch.arange(16.0), torch.full((16,), 3.0)
    assert unpack(Packed(4, quads, scales, None)).tolist() == [[*((first - 8) / 2).tolist(), *[-2.5] * 16]]
    assert unpack(Packed(4, quads, scales, minimums)).tolist() == [torch.cat((first, second)).div(2).sub(1).tolist()]
    bytes_ = torch.arange(-16, 16, dtype=torch.int8).view(1, 1, 32)
    assert unpack(Packed(8, bytes_, scales, None)).tolist() == [torch.arange(-16.0, 16.0).div(2).tolist()]
    assert unpack(Packed(8, bytes_, scales, minimums)).tolist() == [torch.arange(-16.0, 16.0).div(2).sub(1).tolist()]


@pytest.mark.parametrize(("weights", "plain"), [(gaussian, 0.87), (heavy_tailed, 0.85)])
def test_four_bits_are_nearer_than_plain_rounding(weights, plain) -> None:
    weight = weights(64, 512)
    assert relative_error(weight, quantize(weight, 4)) < plain * float(
        (rounded_plainly(weight) - weight).square().sum() / weight.square().sum()
    )


def test_eight_bits_are_within_half_a_step() -> None:
    weight = heavy_tailed(64, 512)
    packed = quantize(weight, 8)
    assert packed.minimums is None
    error = (unpack(packed) - weight).abs().view(64, 16, 32).amax(2)
    assert (error <= packed.scales.float() * 0.57).all()  # half, and 127 times the rounding of the scale itself
    assert relative_error(weight, packed) < 1e-4


@form
def test_what_lies_on_a_grid_is_kept(bits: int) -> None:
    random = torch.Generator().manual_seed(1)
    codes = torch.randint(-8, 8, (20, 4, 32), generator=random) if bits == 4 else torch.randint(-127, 128, (20, 4, 32))
    codes[..., 5], codes[..., 9] = (-8, 7) if bits == 4 else (-127, 127)
    scales = torch.rand(20, 4, 1, generator=random).add_(0.5).half().float()
    weight = (codes * scales).flatten(1)
    packed = quantize(weight, bits)
    assert torch.allclose(packed.scales.abs().float(), scales.squeeze(2), rtol=1e-3)
    assert relative_error(weight, packed) < 1e-6


@form
def test_shapes_and_padding(bits: int) -> None:
    weight = gaussian(3, 70)
    packed = quantize(weight, bits)
    assert packed.codes.shape == (3, 3, bits * 4)
    assert packed.codes.dtype is (torch.uint8 if bits == 4 else torch.int8)
    assert packed.scales.shape == (3, 3)
    assert packed.scales.dtype is torch.float16
    assert (packed.minimums is None) == (bits == 8)
    filled = torch.nn.functional.pad(weight, (0, 26))
    assert all(torch.equal(a, b) for a, b in zip(packed, quantize(filled, bits), strict=True) if isinstance(a, Tensor))
    for rows, columns in ((0, 64), (5, 0)):
        assert unpack(quantize(torch.empty(rows, columns), bits)).shape == (rows, columns)


@form
def test_bfloat16_is_read_as_it_is(bits: int) -> None:
    weight = gaussian(4, 64).bfloat16()
    ours, theirs = quantize(weight, bits), quantize(weight.float(), bits)
    assert torch.equal(ours.codes, theirs.codes)
    assert torch.equal(ours.scales, theirs.scales)


@form
def test_tiles_join(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = gaussian(11, 96)
    whole = quantize(weight, bits)
    monkeypatch.setattr("ringlm.weights.packed._TILE", 4 * 96)
    tiled = quantize(weight, bits)
    assert torch.equal(unpack(tiled), unpack(whole))


@form
def test_constant_blocks(bits: int) -> None:
    weight = torch.zeros(1, 128)
    weight[0, 32:64], weight[0, 64:96], weight[0, 96:] = 0.25, -3.0, 1e-12
    got = unpack(quantize(weight, bits))
    assert torch.allclose(got, weight, rtol=2.0**-10, atol=1e-7)
    assert torch.equal(got[:, :32], weight[:, :32])


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-1000, 1000, width=32), min_size=32, max_size=32), st.sampled_from([1e-6, 1e-3, 1.0]))
def test_any_block_is_as_near_as_plain_rounding_may_be(values: list[float], factor: float) -> None:
    weight = torch.tensor([values]) * factor
    low, high = weight.aminmax()
    peak = float(weight.abs().max())
    own = peak * 2.0**-9 + 1e-6  # scales and minimums are themselves rounded, to multiples of 6e-8 at least
    error = float((unpack(quantize(weight, 4)) - weight).square().mean().sqrt())
    assert error <= float(high - low) / 30 + own
    error = float((unpack(quantize(weight, 8)) - weight).abs().max())
    assert error <= peak / 254 + peak * 2.0**-11 + 4e-6


@form
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e8, -3e38])
def test_what_no_scale_holds_is_refused(bits: int, bad: float) -> None:
    weight = gaussian(5, 96)
    weight[3, 40] = bad
    with pytest.raises(ValueError, match="not finite, or too large"):
        quantize(weight, bits)
