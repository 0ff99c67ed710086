"""What a rank costs: memory near its share of the weights, and no processor time while nobody asks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ringlm.cluster.settings import Settings
from ringlm.engine.request import SamplingParams
from ringlm.models.config import read_config
from ringlm.models.loader import ShardLoader
from ringlm.models.registry import builder
from ringlm.parallel.communicator import Alone
from ringlm.parallel.shard import plan_shards
from ringlm.weights.files import open_model
from tests.cluster.rings import ProcessRing, process_ring

MB = 1_000_000
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


def private_bytes(status: str) -> int:
    """RssAnon in the text of a /proc/PID/status."""
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def baseline() -> int:
    """Of an engine process that has done nothing but its imports."""
    code = "import ringlm.cluster.worker; print(open('/proc/self/status').read())"
    return private_bytes(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    )


def share(path: Path, rank: int, world_size: int) -> int:
    """Bytes of weights that `rank` holds in float32."""
    files = open_model(path)
    config = read_config(files.config)
    plan = plan_shards(read_config(files.config), world_size)
    survey = ShardLoader(files.tensors, Alone(), torch.device("meta"), torch.float32)
    return builder(config.architecture)(config, plan.ranks[rank], survey).nbytes


def processor_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def answer(ring: ProcessRing) -> None:
    ring.client.submit(list(range(100, 200)), SamplingParams(max_tokens=5, temperature=0))
    while (event := ring.client.next_event(90.0)) is not None:
        if event.finish_reason is not None:
            return
    raise TimeoutError("no answer")


def test_memory_is_near_the_share_and_an_idle_ring_rests_and_is_there_still(demo_gguf: Path, tmp_path: Path) -> None:
    with process_ring(str(demo_gguf), 2, tmp_path, settings=Settings(dtype="float32")) as ring:
        answer(ring)
        imports = baseline()
        for rank in (0, 1):
            private = private_bytes(Path(f"/proc/{ring.pid(rank)}/status").read_text()) - imports
            assert private <= share(demo_gguf, rank, 2) * 1.15 + 200 * MB
        before = [processor_s(ring.pid(rank)) for rank in (0, 1)]
        time.sleep(10.0)  # longer also than any limit of a heartbeat
        after = [processor_s(ring.pid(rank)) for rank in (0, 1)]
        assert sum(after) - sum(before) < 0.1  # under 1% of a core
        answer(ring)
