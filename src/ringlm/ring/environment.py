"""What the environment says of this rank: a table of the programs that start ranks, and the variables that they set.

None of them tells a rank its neighbour; they tell all ranks, or let one guess, where rank 0 is. Knows strings only:
whether they make a ring is `config.py`'s to judge.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from typing import NamedTuple

from ringlm.errors import ConfigError

MASTER_PORT = 29500  # torchrun's
_JOB_PORTS = range(20_000, 30_000)  # below those that systems give to connections


class Launcher(NamedTuple):
    """A program that starts ranks, by the names of its variables.

    marks: others that must be there, too. here: how many ranks are on this machine. job: tell two jobs apart.
    shells: it also opens shells, as a world of one, which is no ring. hint: how to say where rank 0 is.
    """

    name: str
    rank: str
    world_size: str
    marks: tuple[str, ...] = ()
    here: str = ""
    job: tuple[str, ...] = ()
    shells: bool = False
    hint: str = "set MASTER_ADDR"


# Outer ones start inner ones: srun a torchrun a node, or mpirun's helpers; a pod any. The innermost one counts.
LAUNCHERS = (
    Launcher("torchrun", "RANK", "WORLD_SIZE"),
    Launcher(
        "Open MPI's mpirun",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        here="OMPI_COMM_WORLD_LOCAL_SIZE",
        job=("PMIX_NAMESPACE",),
        hint="mpirun -x MASTER_ADDR=HOST",
    ),
    Launcher("MPICH's mpirun", "PMI_RANK", "PMI_SIZE", here="MPI_LOCALNRANKS", hint="mpirun -genv MASTER_ADDR HOST"),
    Launcher(
        "srun",
        "SLURM_PROCID",
        "SLURM_NTASKS",
        marks=("SLURM_STEP_NODELIST",),  # the script of a job has the others, too, and is no rank
        job=("SLURM_JOB_ID", "SLURM_STEP_ID"),
        shells=True,
    ),
    Launcher("a Kubernetes indexed Job", "JOB_COMPLETION_INDEX", "WORLD_SIZE", hint="set MASTER_ADDR to JOB-0.SERVICE"),
)


def launcher(environ: Mapping[str, str]) -> Launcher | None:
    """Who has started this process as a rank of a ring, if anybody in the table has."""
    for each in LAUNCHERS:
        size = environ.get(each.world_size) or environ.get("RING_WORLD_SIZE")
        if size and all(environ.get(name) for name in (each.rank, *each.marks)) and not (each.shells and size == "1"):
            return each
    return None


def master_host(environ: Mapping[str, str], started_by: Launcher) -> str:
    """Where rank 0 is when nobody says so: here if all ranks are, else on Slurm's first node. Raises ConfigError."""
    if started_by.here and environ.get(started_by.here) == environ.get(started_by.world_size):
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_node(nodes)
    raise ConfigError(f"{started_by.name} does not tell its ranks where rank 0 is; {started_by.hint}.")


def master_port(environ: Mapping[str, str], started_by: Launcher) -> int:
    """A port on which all ranks of a job meet when nobody has said so: jobs on one machine have different ones."""
    job = [environ[name] for name in started_by.job if name in environ]
    return _JOB_PORTS[zlib.crc32(" ".join(job).encode()) % len(_JOB_PORTS)] if job else MASTER_PORT


def first_node(nodes: str) -> str:
    """The first of a node list of Slurm's, such as `a[07-09,12],b`; loopback when it is the only one."""
    if not re.search(r",|\[[^]]*-", nodes):
        return "127.0.0.1"
    first = re.match(r"(\[[^]]*\]|[^,\[])*", nodes)
    return re.sub(r"\[([^],-]*)[^]]*\]", r"\1", first[0] if first else nodes)
