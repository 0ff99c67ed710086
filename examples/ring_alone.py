"""The ring without a model: a few collectives between processes, on one machine or on several.

    torchrun --nproc-per-node 3 examples/ring_alone.py
    mpirun -n 3 python examples/ring_alone.py

or in two terminals, with a shared RING_SECRET where the other one is another machine:

    RING_RANK=0 RING_WORLD_SIZE=2 RING_PORT=1500 RING_RIGHT=1501 python examples/ring_alone.py
    RING_RANK=1 RING_WORLD_SIZE=2 RING_PORT=1501 RING_RIGHT=1500 python examples/ring_alone.py
"""

from __future__ import annotations

import torch

from ringlm.ring import RingConfig, connect


def main() -> None:
    with connect(RingConfig.from_env()) as ring:
        mine = torch.full((3,), float(ring.rank + 1))
        total = ring.all_reduce(mine.clone())
        print(f"rank {ring.rank} of {ring.world_size}: the sum is {total.tolist()}", flush=True)

        # in the background, while this rank does something else
        handle = ring.submit(ring.all_gather, mine[: 1 + ring.rank % 2])
        pieces = handle.wait(timeout_s=60.0)
        print(f"rank {ring.rank}: everybody's pieces are {[piece.tolist() for piece in pieces]}", flush=True)

        # from one rank to the next, all round
        letter = torch.empty(3)
        ring.send(mine, (ring.rank + 1) % ring.world_size, tag=7)
        sender = ring.recv(letter, tag=7)
        print(f"rank {ring.rank}: a letter from rank {sender}, {letter.tolist()}", flush=True)
        ring.barrier()


if __name__ == "__main__":
    main()
