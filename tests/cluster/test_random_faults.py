"""A few seeded faults; the 200 of `faults` are in docs/performance.md."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from tests.cluster import faults
from tests.cluster.faults import Campaign, Run, plan, table

STAYS = [
    Run("a", 3, "decode", "kill", recovery=True),
    Run("b", 3, "prefill", "damage", recovery=True),
    Run("c", 3, "recovering", "cut", recovery=True),
    Run("d", 3, "idle", "half-close", recovery=True),
]
FAILS = [Run("e", 3, "connecting", "stall", recovery=False), Run("f", 3, "decode", "cut", recovery=False)]


@pytest.fixture(scope="module")
def campaign(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Campaign]:
    patient = mock.patch.object(faults, "WITHIN_S", faults.PATIENCE_S)  # a busy machine is late, too
    with patient, Campaign(str(tiny_llama), tmp_path_factory.mktemp("faults")) as campaign:
        yield campaign


@pytest.mark.parametrize("run", [*STAYS, *FAILS], ids=lambda run: f"{run.phase}-{run.fault}")
def test_whatever_befalls_a_ring(campaign: Campaign, run: Run) -> None:
    try:
        print(campaign.run(run))
    except BaseException:
        print(campaign.said())
        campaign.drop(orderly=False)
        raise


def test_every_phase_meets_every_fault_at_every_world_size() -> None:
    runs = plan(200, seed=1)
    assert len({(run.world_size, run.phase, run.fault) for run in runs}) == 3 * 7 * 8
    assert plan(200, seed=1) == runs != plan(200, seed=2)
    assert table([(run, True) for run in runs]).count("/") == 3 * 7 * 8
