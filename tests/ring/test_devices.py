"""Tensors that are not in host memory: the same sums, to the bit, as the CPU's."""

from __future__ import annotations

import pytest
import torch

from ringlm.ring import Ring
from tests.ring.helpers import contribution, each, expected_sum, thread_ring

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("devices", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu", "cuda")])
def test_sums_are_the_same_bits_wherever_they_are_wanted(devices: tuple[str, ...], dtype: torch.dtype) -> None:
    lengths = [0, 256, 1536, 65_536, 1 << 20, 8 << 20]
    with thread_ring(len(devices)) as rings:

        def work(ring: Ring) -> list[torch.Tensor]:
            mine = [contribution(n, ring.rank, n, dtype).to(devices[ring.rank]) for n in lengths]
            return [ring.all_reduce(tensor) for tensor in mine]

        for device, results in zip(devices, each(rings, work), strict=True):
            for length, result in zip(lengths, results, strict=True):
                assert result.device.type == device
                assert torch.equal(result.cpu(), expected_sum(length, len(devices), length, dtype))
