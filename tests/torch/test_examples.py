"""The scripts in examples/torch, most of which compare what they do with one process: DistributedDataParallel, DTensor,
FSDP2 and its checkpoints, DeviceMesh, accelerate, and, under torchrun, transformers."""

from __future__ import annotations

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.cluster.local import free_ports
from tests.processes import DEADLINE_S
from tests.torch.ranks import Here, Ranks

EXAMPLES = Path(__file__).parents[2] / "examples" / "torch"


@pytest.fixture(scope="module")
def processes() -> Iterator[Ranks]:
    with Ranks(4, None) as processes:
        yield processes


def act(here: Here, name: str, world_size: int, port: int) -> str:
    """What a rank prints, started as torchrun does it."""
    if here.rank >= world_size:
        return ""
    os.environ |= {
        "RANK": str(here.rank),
        "LOCAL_RANK": str(here.rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.argv = [name]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()) as said:
        warnings.simplefilter("ignore")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return said.getvalue()


def run(processes: Ranks, name: str, world_size: int) -> str:
    return "".join(processes.call(act, name, world_size, *free_ports(1)))


def test_ddp(processes: Ranks) -> None:
    losses = [float(found) for found in re.findall(r"step \d+: loss ([\d.]+)", run(processes, "ddp.py", 2))]
    assert len(losses) == 4
    assert losses[3] < losses[0] / 5


def test_tensor_parallel(processes: Ranks) -> None:
    said = run(processes, "tensor_parallel.py", 2)
    assert [f"rank {rank}: 1072 parameters here; as on one process: True" in said for rank in range(2)] == [True] * 2


def test_fsdp_and_its_checkpoint(processes: Ranks) -> None:
    said = run(processes, "fsdp.py", 2)
    assert said.count("goes on from its checkpoint: True; as on one process: True") == 2


def test_mesh(processes: Ranks) -> None:
    said = run(processes, "mesh.py", 4)
    for rank, (row, column) in enumerate([(1, 2), (1, 4), (5, 2), (5, 4)]):
        assert f"rank {rank}: row {row}, column {column}, product: True" in said


def test_accelerate(processes: Ranks) -> None:
    assert re.search(r"2 processes over ring: loss 0\.00", run(processes, "with_accelerate.py", 2))


def test_transformers_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("RING_", "MASTER_"))}
    done = subprocess.run(
        [*command, str(EXAMPLES / "generate.py")],
        env=environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S + 20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("as on one process: True") == 2
