"""Who started this rank: every launcher's variables, who beats whom, and where rank 0 is."""

from __future__ import annotations

import pytest

from ringlm.errors import ConfigError
from ringlm.ring.address import Address
from ringlm.ring.config import RingConfig
from ringlm.ring.environment import first_node

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}
SRUN = {
    "SLURM_PROCID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_NODELIST": "gpu[01-09]",
}
POD = {"JOB_COMPLETION_INDEX": "1", "RING_WORLD_SIZE": "2", "RING_MASTER_IP": "ringlm-0.ring"}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "gpu[07-08]"}
HUSH = {"RING_SECRET": "hush"}


@pytest.mark.parametrize(
    ("environ", "master"),
    [
        (TORCHRUN, Address("127.0.0.1", 29501)),
        (OPEN_MPI, Address("127.0.0.1", 29500)),
        (MPICH, Address("127.0.0.1", 29500)),
        (SRUN | HUSH, Address("gpu07", 29500)),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu07"}, Address("127.0.0.1", 29500)),
        (POD | HUSH, Address("ringlm-0.ring", 29500)),
        (POD | HUSH | {"WORLD_SIZE": "2", "MASTER_PORT": "1234"}, Address("ringlm-0.ring", 1234)),
        (SRUN | HUSH | {"MASTER_ADDR": "10.0.0.7"}, Address("10.0.0.7", 29500)),
        # mpirun's helpers, and a torchrun a node, are srun's tasks; a pod may have any of them.
        (SRUN | HUSH | {"SLURM_PROCID": "0"} | OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, Address("gpu07", 29500)),
        (SRUN | {"SLURM_PROCID": "0"} | MPICH, Address("127.0.0.1", 29500)),
        (SRUN | {"SLURM_NTASKS": "8", "JOB_COMPLETION_INDEX": "5"} | TORCHRUN, Address("127.0.0.1", 29501)),
    ],
)
def test_a_rank_of_two(environ: dict[str, str], master: Address) -> None:
    assert RingConfig.present(environ)
    config = RingConfig.from_env(environ)
    assert (config.rank, config.world_size, config.right, config.master) == (1, 2, None, master)


@pytest.mark.parametrize(
    "environ",
    [
        BATCH_SCRIPT,
        SRUN | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"},  # a shell that srun opened
        {"JOB_COMPLETION_INDEX": "1"},
        {"OMPI_COMM_WORLD_RANK": "1"},
    ],
)
def test_no_ring(environ: dict[str, str]) -> None:
    assert not RingConfig.present(environ)


def test_neighbours_that_are_known_need_no_master() -> None:
    config = RingConfig.from_env(SRUN | {"RING_PORT": "1", "RING_RIGHT": "2"})
    assert (config.right, config.master) == (Address("127.0.0.1", 2), None)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (OPEN_MPI | {"RING_RANK": "0"}, "RING_RANK is 0 but OMPI_COMM_WORLD_RANK is 1; unset one of them."),
        (SRUN | {"RING_WORLD_SIZE": "4"}, "RING_WORLD_SIZE is 4 but SLURM_NTASKS is 2; unset one of them."),
        (POD | {"RING_RANK": "0"}, "RING_RANK is 0 but JOB_COMPLETION_INDEX is 1; unset one of them."),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "x"}, "OMPI_COMM_WORLD_RANK is 'x'; it must be a whole number."),
        (
            OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
            "Open MPI's mpirun does not tell its ranks where rank 0 is; mpirun -x MASTER_ADDR=HOST.",
        ),
        (SRUN, "the master gpu07:29500 is another machine; links beyond loopback need a shared secret"),
    ],
)
def test_what_is_wrong(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        RingConfig.from_env(environ)
    assert str(caught.value).startswith(message)


def test_jobs_of_one_machine_meet_at_different_ports() -> None:
    jobs = [SRUN | HUSH | {"SLURM_JOB_ID": "77", "SLURM_STEP_ID": step} for step in ("0", "1")]
    masters = [RingConfig.from_env(job).master for job in jobs]
    assert masters[0] is not None
    assert masters[1] is not None
    assert masters[0].port != masters[1].port
    assert RingConfig.from_env(jobs[0] | {"SLURM_PROCID": "0"}).master == masters[0]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1,n2", "n1"),
        ("a-b[007-009,012],c", "a-b007"),
        ("a[3,5-9]", "a3"),
        ("rack[1-2]n[4-5]x,b", "rack1n4x"),
        ("a[3,5]", "a3"),
        ("a-1.example.org", "127.0.0.1"),
        ("a[7]", "127.0.0.1"),
    ],
)
def test_node_lists(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
