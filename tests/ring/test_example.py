"""examples/ring_alone.py as its first lines say: under torchrun, and with RING_* in two terminals."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from ringlm.cluster.local import free_ports

EXAMPLE = Path(__file__).parents[2] / "examples" / "ring_alone.py"


def environment(**changes: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("RING_", "MASTER_"))}
    return plain | {"OMP_NUM_THREADS": "1"} | changes


def test_under_torchrun() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", str(EXAMPLE)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    for rank in range(3):
        assert f"rank {rank} of 3: the sum is [6.0, 6.0, 6.0]" in done.stdout
        assert f"rank {rank}: everybody's pieces are [[1.0], [2.0, 2.0], [3.0]]" in done.stdout
        left = (rank - 1) % 3
        assert f"rank {rank}: a letter from rank {left}, {[float(left + 1)] * 3}" in done.stdout


def test_in_two_terminals() -> None:
    ports = free_ports(2)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(EXAMPLE)],
            env=environment(
                RING_RANK=str(rank), RING_WORLD_SIZE="2", RING_PORT=str(ports[rank]), RING_RIGHT=str(ports[1 - rank])
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank, process in enumerate(ranks):
        out, err = process.communicate(timeout=90)
        assert process.returncode == 0, err
        assert f"rank {rank} of 2: the sum is [3.0, 3.0, 3.0]" in out
