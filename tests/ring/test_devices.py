"""Staging of device memory, with a device whose copies take place only when it is waited for, and with CUDA."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ringlm.ring import Ring
from ringlm.ring.devices import Staging
from tests.ring.helpers import contribution, each, expected_sum, thread_ring


class FakeDevice(Staging):
    """Tensors of `kind` are its own. Copies from it are late: whoever reads before `synchronize` reads noise."""

    def __init__(self, kind: torch.dtype) -> None:
        self.kind = kind
        self.late: list[Callable[[], object]] = []
        self.waits = 0
        self.up = 0

    def in_host_memory(self, tensor: torch.Tensor) -> bool:
        return tensor.dtype != self.kind

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.late.append(lambda: target.copy_(source))

    def empty(self, length: int, like: torch.Tensor) -> torch.Tensor:
        return torch.full((length,), 77, dtype=like.dtype)

    def give(self, tensor: torch.Tensor, flat: torch.Tensor) -> torch.Tensor:
        if flat.data_ptr() != tensor.data_ptr():
            self.up += 1
            tensor.detach().copy_(flat.view(tensor.shape))
        return tensor

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1
        for copy in self.late:
            copy()
        self.late.clear()


def test_a_group_may_mix_devices_and_waits_once_a_call() -> None:
    """Ranks 1 and 2 have their float32 tensors on a device, rank 0 in host memory."""
    with thread_ring(3) as rings:
        fakes = [FakeDevice(torch.float32) for _ in rings]
        for ring, fake in zip(rings[1:], fakes[1:], strict=True):
            ring._staging = fake

        def work(ring: Ring) -> None:
            def own(of: int, length: int = 6) -> torch.Tensor:
                return torch.arange(float(length)) + of

            fake, counted = fakes[ring.rank], 0

            def waits(expected: int) -> None:
                nonlocal counted
                counted += expected if ring.rank else 0
                assert fake.waits == counted
                assert not fake.late

            assert torch.equal(ring.all_reduce(own(ring.rank)), 3 * own(1))
            waits(1)
            assert torch.equal(ring.all_reduce(own(ring.rank).view(2, 3).t()), 3 * own(1).view(2, 3).t())
            waits(1)
            assert torch.equal(ring.broadcast(own(ring.rank), 1), own(1))
            waits(ring.rank == 1)
            assert all(
                torch.equal(p, own(r, 2 + r)) for r, p in enumerate(ring.all_gather(own(ring.rank, 2 + ring.rank)))
            )
            waits(1)
            swapped = ring.all_to_all([own(10 * ring.rank + peer) for peer in range(3)])
            assert all(torch.equal(p, own(10 * peer + ring.rank)) for peer, p in enumerate(swapped))
            waits(1)
            assert torch.equal(ring.reduce_scatter([own(p) for p in range(3)], "max"), own(ring.rank))
            waits(1)
            if ring.rank == 1:
                ring.send(own(5), 2)
            if ring.rank == 2:
                letter = torch.zeros(6)
                ring.recv(letter, 1)
                assert torch.equal(letter, own(5))
            waits(ring.rank == 1)
            assert ring.all_reduce(torch.ones(2, dtype=torch.int64)).tolist() == [3, 3]
            waits(0)

        each(rings, work)
        assert fakes[1].up > 0


def test_views_that_are_negated_or_conjugated_lazily() -> None:
    with thread_ring(2) as rings:

        def work(ring: Ring) -> list[complex]:
            numbers = torch.tensor([1 + 2j, 3 - 1j])
            flipped = numbers.conj()
            ring.all_reduce(flipped)
            assert ring.all_gather(numbers.conj().imag)[1].tolist() == numbers.conj().imag.tolist()
            return flipped.tolist()

        assert each(rings, work) == [[2 - 4j, 6 + 2j]] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
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
