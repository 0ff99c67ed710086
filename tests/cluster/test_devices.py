"""Which device a rank computes on, with GPUs that are not there."""

from __future__ import annotations

import pytest
import torch

from ringlm.cluster.loading import own_gpu, pick_device
from ringlm.errors import ConfigError


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Those that were made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


def test_ranks_of_one_machine_take_a_gpu_each_while_there_are_as_many(two_gpus: list[torch.device]) -> None:
    assert [own_gpu(pick_device("auto"), place).index for place in range(3)] == [0, 1, 0]
    assert [device.index for device in two_gpus] == [0, 1, 0]


def test_a_gpu_that_was_asked_for_stays(two_gpus: list[torch.device]) -> None:
    assert own_gpu(pick_device("cuda:1"), 0) == torch.device("cuda", 1)


@pytest.mark.parametrize("name", ["cuda:2", "tpu", "mps"])
def test_one_that_is_not_there_is_refused(name: str, two_gpus: list[torch.device]) -> None:
    with pytest.raises(ConfigError, match=f"^--device {name}"):
        pick_device(name)
