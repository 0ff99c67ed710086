"""Other people's launchers start a ring: the examples, as their first lines say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# mpirun refuses root and more ranks than cores unless it is told otherwise.
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


@pytest.mark.parametrize("example", ["torchrun.sh", "mpirun.sh"])
def test_an_example_starts_a_ring(example: str, tiny_llama: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    bench = ["bench", "-m", str(tiny_llama), "-p", "8", "-n", "4", "-r", "1", "--json"]
    done = subprocess.run(
        [EXAMPLES / example, *bench],
        env=os.environ | MPI | {"PATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["world_size"] == 2  # one rank speaks, the other serves it
