"""Quantized folders for tests, each beside an unquantized one of the very same weights, from the formats' documents."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.models.reference import save

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]  # of the outputs in a word, from its low end
SIZES: dict[str, Any] = {
    "hidden_size": 192,
    "head_dim": 32,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "intermediate_size": 320,
    "initializer_range": 0.08,
}


class Method(NamedTuple):
    """How matrices are quantized: `store` makes tensors (by what follows the layer's name) and their exact weights."""

    config: dict[str, Any]  # what config.json has beside the model's own
    store: Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
    packed: tuple[int, bool] | None  # bits, and whether with minimums, of the packed form that keeps the codes
    embedding: bool = False  # whether the embedding and the output head are quantized, too


def write(folder: Path, method: Method, **changes: Any) -> tuple[Path, Path]:
    """A Llama by `method`, and the unquantized one that it stands for."""
    truth = save(folder / "truth", **(SIZES | changes))
    quantized = shutil.copytree(truth, folder / "quantized")
    config = json.loads((truth / "config.json").read_text())
    (quantized / "config.json").write_text(json.dumps(config | method.config))
    plain, stored = load_file(truth / "model.safetensors"), {}
    for name, tensor in plain.items():
        layer = name.removesuffix("weight")
        inner = ".layers." in name or method.embedding
        if tensor.dim() != 2 or not inner:
            stored[name] = tensor
            continue
        parts, plain[name] = method.store(tensor)
        stored |= {layer + part: value.contiguous() for part, value in parts.items()}
    save_file(plain, truth / "model.safetensors")
    save_file(stored, quantized / "model.safetensors")
    return quantized, truth


def words(codes: Tensor, bits: int) -> Tensor:
    """int (n, columns) to int32 words (n, columns * bits / 32), the first code in the lowest bits."""
    held = 32 // bits
    shifted = codes.long().unflatten(1, (-1, held)) << torch.arange(held) * bits
    return shifted.sum(2).to(torch.uint32).view(torch.int32)


def grouped(weight: Tensor, bits: int, group: int, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (out, in), float16 scales and int zeros (out, groups): weight = scale * (code - zero)."""
    blocks = weight.unflatten(1, (-1, group))
    low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
    top = (1 << bits) - 1
    if symmetric:
        scales = (torch.maximum(-low, high) * 2 / top).half()
        zeros = torch.full(scales.shape, 1 << bits - 1)
    else:
        scales = ((high - low) / top).half()
        zeros = (-low / scales).round().clamp(1, top).long()
    codes = (blocks / scales.unsqueeze(2) + zeros.unsqueeze(2)).round().clamp(0, top)
    return codes.flatten(1).long(), scales, zeros


def dense(codes: Tensor, scales: Tensor, zeros: Tensor, order: Tensor) -> Tensor:
    """The weights, `order` being the group of each column; exact in float32."""
    return scales.float()[:, order] * (codes - zeros[:, order])


def gptq(bits: int = 4, group: int = 32, symmetric: bool = True, act: bool = False, version: int = 1) -> Method:
    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = weight.shape[1]
        size = columns if group == -1 else group
        codes, scales, zeros = grouped(weight, bits, size, symmetric)
        order = torch.arange(columns) // size
        if act:  # the inputs in the order of their activations: groups are of columns that do not lie together
            order = order[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        stored = zeros - 1 if version == 1 else zeros
        parts = {
            "qweight": words(codes, bits).t(),
            "qzeros": words(stored.t(), bits),
            "scales": scales.t(),
            "g_idx": order.int(),
            "bias": torch.zeros(len(weight), dtype=torch.float16),
        }
        return parts, dense(codes, scales, zeros, order)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act}
    if version == 2:
        config["checkpoint_format"] = "gptq_v2"
    packable = not act and (group == -1 or group % 32 == 0)
    return Method({"quantization_config": config}, store, (bits, not symmetric) if packable else None)


def awq(group: int = 32) -> Method:
    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scales, zeros = grouped(weight, 4, group)

        def ordered(values: Tensor) -> Tensor:
            return words(values.t().unflatten(1, (-1, 8))[:, :, AWQ_ORDER].flatten(1), 4)

        parts = {"qweight": ordered(codes), "qzeros": ordered(zeros), "scales": scales.t()}
        return parts, dense(codes, scales, zeros, torch.arange(weight.shape[1]) // group)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Method({"quantization_config": config}, store, (4, True))


def mlx(bits: int = 4, group: int = 64, dtype: torch.dtype = torch.bfloat16) -> Method:
    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        blocks = weight.unflatten(1, (-1, group))
        low, high = blocks.aminmax(dim=2)
        scales, biases = ((high - low) / ((1 << bits) - 1)).to(dtype), low.to(dtype)
        codes = ((blocks - biases.float().unsqueeze(2)) / scales.float().unsqueeze(2)).round()
        codes = codes.clamp(0, (1 << bits) - 1).flatten(1).long()
        parts = {"weight": words(codes, bits).view(torch.uint32), "scales": scales, "biases": biases}
        order = torch.arange(weight.shape[1]) // group
        return parts, scales.float()[:, order] * codes + biases.float()[:, order]

    settings = {"group_size": group, "bits": bits}
    return Method({"quantization": settings, "quantization_config": settings}, store, (bits, True), embedding=True)


def fp8(rows: int = 0, columns: int = 0, name: str = "weight_scale_inv", method: str = "fp8") -> Method:
    """With a scale for blocks of that many rows and columns; 0: all of them."""

    def store(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        high, wide = rows or weight.shape[0], columns or weight.shape[1]
        down, across = torch.arange(weight.shape[0]) // high, torch.arange(weight.shape[1]) // wide
        scales = torch.zeros(int(down.max()) + 1, int(across.max()) + 1)
        for row in range(scales.shape[0]):
            for column in range(scales.shape[1]):
                scales[row, column] = weight[down == row][:, across == column].abs().max() / 448
        every = scales[down][:, across]
        codes = (weight / every).to(torch.float8_e4m3fn)
        found = scales.reshape(()) if scales.numel() == 1 else scales
        return {"weight": codes, name: found, "input_scale": torch.ones(1)}, codes.float() * every

    config: dict[str, Any] = {"quant_method": method}
    if rows and columns:
        config["weight_block_size"] = [rows, columns]
    if method == "compressed-tensors":
        config["format"] = "float-quantized"
        config["config_groups"] = {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}}
    return Method({"quantization_config": config}, store, None)


METHODS = {
    "gptq": gptq(),
    "gptq with zeros": gptq(symmetric=False, group=64),
    "gptq of all inputs": gptq(group=-1),
    "gptq by activations": gptq(act=True),
    "gptq 2": gptq(symmetric=False, version=2),
    "gptq in 8 bits": gptq(8),
    "gptq in 8 bits with zeros": gptq(8, symmetric=False),
    "gptq in small groups": gptq(group=16, symmetric=False),
    "awq": awq(),
    "mlx": mlx(),
    "mlx in 8 bits": mlx(8, 32, torch.float16),
    "fp8 by blocks": fp8(100, 48),
    "fp8 by matrices": fp8(name="weight_scale"),
    "fp8 by rows": fp8(1, 0, "weight_scale", "fbgemm_fp8"),
    "compressed-tensors": fp8(1, 0, "weight_scale", "compressed-tensors"),
}
