#!/usr/bin/env bash
# A ring by mpirun, of Open MPI, MPICH or Intel MPI: it starts a process a rank. MPI itself is not used.
#
# Two ranks on this machine:
#
#     examples/mpirun.sh run -m demo --prompt "What is TCP?"
#
# On several machines, with Open MPI (MPICH has -genv NAME VALUE in place of -x NAME). The master is the machine of
# rank 0, the first in --host; ringlm is at the same path everywhere, and the secret in a file that every machine has:
#
#     mpirun --host first,second -x MASTER_ADDR=first -x RING_SECRET_FILE=$HOME/.ring-secret \
#         ringlm serve -m MODEL
set -euo pipefail
exec mpirun -n "${RANKS:-2}" ringlm "$@"
