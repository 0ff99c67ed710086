"""Packed models on each device, and on a ring of both, against the float32 model that their codes stand for.

    python benchmarks/devices.py MODEL [--quant int8,int4] [--tokens 64]

Reported are the relative distance of all logits, and how often the most likely token is the same. A prompt of random
tokens is fed but for its last four, then those one by one. The two ranks of the ring are threads of this process.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from ringlm.cluster.agreement import BITS
from ringlm.frontend.model import resolve
from ringlm.models.batch import Batch
from ringlm.models.config import read_config
from ringlm.models.loader import load_model
from ringlm.parallel.communicator import Alone, Communicator
from ringlm.parallel.shard import plan_shards
from ringlm.ring import RingConfig, connect
from ringlm.ring.address import Address
from ringlm.weights.files import ModelFiles, open_model
from ringlm.weights.packed import quantize, unpack

_SINGLES = 4  # tokens that come one by one, at the end


class Rounded:
    """A source whose matrices have been packed and unpacked again; what the file holds packed is as it is."""

    def __init__(self, source: Any, bits: int) -> None:
        self._source, self._bits = source, bits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str, rows: Any = None, columns: Any = None, dtype: Any = None) -> Tensor:
        """As the source's."""
        found: Tensor = self._source.read(name, rows, columns, dtype)
        if columns is None or self._source.packed(name, slice(0, 0), slice(0, 0)) is not None:
            return found
        bits = 8 if name in ("model.embed_tokens.weight", "lm_head.weight") else self._bits
        return unpack(quantize(found, bits))[:, : found.shape[1]].to(found.dtype)


def logits(files: ModelFiles, comm: Communicator, tokens: Sequence[int], device: str, **options: Any) -> Tensor:
    """float32 (tokens, vocabulary) on rank 0, on the CPU."""
    plan = plan_shards(read_config(files.config, files.name), comm.world_size)
    loaded = load_model(
        files, plan, comm.rank, comm, device=torch.device(device), context=len(tokens) + 8, **options
    )  # fmt: skip
    cache, parts, first = loaded.new_cache(1, len(tokens)), [], 0
    for length in [len(tokens) - _SINGLES, *[1] * _SINGLES]:
        batch = Batch.of([(tokens[first : first + length], first, [0])], list(range(length)), loaded.device)
        pieces = comm.gather(loaded.forward(batch, cache).contiguous())
        parts.append(torch.cat([piece.cpu() for piece in pieces or ()], 1) if pieces else torch.empty(0))
        first += length
    return torch.cat(parts)


def of_two(files: ModelFiles, tokens: Sequence[int], devices: Sequence[str], **options: Any) -> Tensor:
    """The same of a ring with a rank on each of two devices."""
    with socket.socket() as one, socket.socket() as other:
        for probe in (one, other):
            probe.bind(("127.0.0.1", 0))
        ports = one.getsockname()[1], other.getsockname()[1]

    def rank(number: int) -> Tensor:
        right = Address("127.0.0.1", ports[1 - number])
        with connect(RingConfig(rank=number, world_size=2, port=ports[number], right=right)) as ring:
            return logits(files, ring, tokens, devices[number], **options)

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(rank, range(2))
        return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--quant", default="int8,int4")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    files = open_model(str(resolve(options.model).path))
    draw = random.Random(0)
    tokens = [draw.randrange(read_config(files.config, files.name).vocabulary) for _ in range(options.tokens)]
    alone, device = Alone(), options.device
    for quant in options.quant.split(","):
        bits = BITS[quant]
        assert bits is not None
        rounded = dataclasses.replace(files, tensors=Rounded(files.tensors, bits))
        exact = logits(rounded, alone, tokens, device, dtype=torch.float32)
        found = {
            f"{device}, float32": logits(files, alone, tokens, device, dtype=torch.float32, bits=bits),
            f"{device}, bfloat16": logits(files, alone, tokens, device, dtype=torch.bfloat16, bits=bits),
            "cpu, float32": logits(files, alone, tokens, "cpu", dtype=torch.float32, bits=bits),
            f"{device} and cpu, float32": of_two(files, tokens, (device, "cpu"), dtype=torch.float32, bits=bits),
        }
        for name, ours in found.items():
            apart = ((ours - exact).norm() / exact.norm()).item()
            same = (ours.argmax(1) == exact.argmax(1)).float().mean().item()
            print(f"{files.name}  {quant}  {name.ljust(24)}  apart {apart:.2e}  same token {same:.0%}", flush=True)


if __name__ == "__main__":
    main()
