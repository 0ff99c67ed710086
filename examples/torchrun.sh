#!/usr/bin/env bash
# A ring by torchrun, which comes with torch: it starts a process a rank, and all of them again when one has died.
#
# Two ranks on this machine:
#
#     examples/torchrun.sh run -m demo --prompt "What is TCP?"
#
# A rank on each of two machines, the same command on both. The secret lets them trust each other; the rendezvous is
# a port of one of the machines, on which torchrun's agents meet:
#
#     export RING_SECRET=...        # the same on both: openssl rand -hex 16
#     NODES=2 RANKS=1 RENDEZVOUS=first.local:29400 examples/torchrun.sh serve -m MODEL
#
# Which agent gets rank 0, the one that answers, is torchrun's choice.
set -euo pipefail
nodes=${NODES:-1}            # machines
ranks=${RANKS:-2}            # processes on each of them
restarts=${RESTARTS:-0}      # how often all may be started again
exec torchrun --nnodes "$nodes" --nproc-per-node "$ranks" --max-restarts "$restarts" \
  --rdzv-backend c10d --rdzv-endpoint "${RENDEZVOUS:-localhost:0}" --rdzv-id "${RUN:-ringlm}" \
  --no-python ringlm "$@"
