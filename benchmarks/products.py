"""Products with packed matrices on a CUDA device against the dense one in bfloat16, without the cost of launching them.

    python benchmarks/products.py [--tokens 1,2,4,16,128,512]

Shapes are those of Llama-3.2-3B; every product reads another copy, so that none comes from the cache. Kernels are
timed in a CUDA graph, in microseconds a product. `torch int4` is torch's own product, in its own order of codes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ringlm.parallel.linear import Dense
from ringlm.parallel.packed_device import DevicePacked, DeviceSegment
from ringlm.weights.packed import Packed

SHAPES = {"qkv": (5120, 3072), "output": (3072, 3072), "gate, up": (16384, 3072), "down": (3072, 8192)}
_CUDA = torch.device("cuda")
_COPIES = 8  # of a matrix, in turn
_REPLAYS = 20


def packed(bits: int, rows: int, columns: int, *, minimums: bool) -> DevicePacked:
    """A matrix of random codes."""
    codes = torch.randint(0, 256, (rows, columns // 32, 4 * bits), dtype=torch.uint8)
    scales = torch.full((rows, columns // 32), 0.01).half()
    whole = Packed(bits, codes, scales, -scales if minimums else None)
    segment = DeviceSegment(whole, rows, _CUDA)
    segment.fill(0, whole)
    return DevicePacked([segment], columns, 0, torch.bfloat16)


def of_torch(rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    """torch's product of 4-bit codes in groups of 32."""
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=_CUDA)
    order = torch.ops.aten._convert_weight_to_int4pack(codes, 2)
    scales = torch.full((columns // 32, rows, 2), 0.01, dtype=torch.bfloat16, device=_CUDA)
    return lambda x: torch.ops.aten._weight_int4pack_mm(x, order, 32, scales)


def microseconds(products: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> float:
    """Of a product, on the device."""
    for product in products:
        product(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    started.record()
    for _ in range(_REPLAYS):
        graph.replay()
    ended.record()
    torch.cuda.synchronize()
    return float(started.elapsed_time(ended)) * 1e3 / (_REPLAYS * len(products))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="1,2,4,16,128,512")
    tokens = [int(text) for text in parser.parse_args().tokens.split(",")]
    torch.set_grad_enabled(False)
    print(torch.__version__, torch.cuda.get_device_name())
    print("  ".join(cell.rjust(10) for cell in ("layer", "tokens", "bfloat16", "int8", "int4", "torch int4")))
    for name, (rows, columns) in SHAPES.items():
        held = [
            [Dense(torch.randn(rows, columns, device=_CUDA, dtype=torch.bfloat16)) for _ in range(_COPIES)],
            [packed(8, rows, columns, minimums=False) for _ in range(_COPIES)],
            [packed(4, rows, columns, minimums=True) for _ in range(_COPIES)],
            [of_torch(rows, columns) for _ in range(_COPIES)],
        ]
        for count in tokens:
            x = torch.randn(count, columns, device=_CUDA, dtype=torch.bfloat16)
            figures = (f"{microseconds(products, x):.1f}" for products in held)
            print("  ".join(cell.rjust(10) for cell in itertools.chain((name, str(count)), figures)), flush=True)


if __name__ == "__main__":
    main()
