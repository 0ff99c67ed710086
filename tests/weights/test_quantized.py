"""Quantized folders, whole, by slice and packed, against the weights that the formats' documents make of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from ringlm.errors import ModelError
from ringlm.models.config import read_config
from ringlm.weights import open_model
from ringlm.weights.packed import BLOCK, unpack
from tests.weights.write_quantized import METHODS, Method, awq, fp8, gptq, mlx, write

DOWN, KEY = "model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"


class Example:
    def __init__(self, method: Method, folder: Path) -> None:
        self.method = method
        self.path, truth = write(folder, method)
        self.source = open_model(self.path).tensors
        self.truth: dict[str, Tensor] = load_file(truth / "model.safetensors")


@pytest.fixture(scope="module", params=METHODS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(METHODS[request.param], tmp_path_factory.mktemp("quantized"))


def test_whole_tensors(example: Example) -> None:
    assert set(example.source.names()) == set(example.truth)
    for name, truth in example.truth.items():
        assert example.source.shape(name) == truth.shape
        got = example.source.read(name, dtype=torch.float32)
        assert got.is_contiguous()
        torch.testing.assert_close(got, truth, atol=0, rtol=2.0**-22 if "quantization" in example.method.config else 0)
        assert torch.equal(example.source.read(name, dtype=torch.bfloat16), got.bfloat16())


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice(example: Example, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([DOWN, KEY]))
    cuts = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in example.source.shape(name)
    )
    assert torch.equal(example.source.read(name, *cuts), example.source.read(name)[cuts])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_packed_slice(example: Example, data: st.DataObject) -> None:
    height, width = example.source.shape(DOWN)
    whole = example.source.packed(DOWN, slice(0, height), slice(0, width // BLOCK))
    cuts = [
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in (height, width // BLOCK)
    ]
    part = example.source.packed(DOWN, *cuts)
    if whole is None or part is None:
        assert whole is part is None
        return
    assert part.bits == whole.bits
    for got, all_of_it in zip(part[1:], whole[1:], strict=True):
        assert (got is None and all_of_it is None) or torch.equal(got, all_of_it[tuple(cuts)])


def test_packed_matrices_keep_codes_and_round_scales(example: Example) -> None:
    for name in (DOWN, KEY):
        height, width = example.source.shape(name)
        assert example.source.form(name) == example.method.packed
        packed = example.source.packed(name, slice(0, height), slice(0, width // BLOCK))
        if packed is None:
            assert example.method.packed is None
            continue
        assert (packed.bits, packed.minimums is not None) == example.method.packed
        error = (unpack(packed) - example.truth[name]).abs().unflatten(1, (-1, BLOCK)).amax(2)
        minimums = torch.zeros_like(error) if packed.minimums is None else packed.minimums.abs().float()
        # Scales are exact; a minimum is rounded to float16, and weights to float32.
        assert (error <= minimums * 2.0**-11 + unpack(packed).abs().amax() * 2.0**-22).all()
        assert packed.minimums is not None or not error.any()


def test_tiles_join(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = example.source.read(DOWN)
    monkeypatch.setattr("ringlm.weights.quantized._TILE", 500)
    assert torch.equal(example.source.read(DOWN), whole)


def test_slices_outside_are_refused(example: Example) -> None:
    with pytest.raises(ValueError, match="is not a part of 192"):
        example.source.read(DOWN, slice(0, 193))
    with pytest.raises(ValueError, match="is not a part of 10"):
        example.source.packed(DOWN, slice(0, 1), slice(0, 11))


def test_layers_of_mlx_with_settings_of_their_own(tmp_path: Path) -> None:
    four, _ = write(tmp_path / "four", mlx())
    eight, truth = write(tmp_path / "eight", mlx(8, 32))
    layer = DOWN.removesuffix(".weight")
    mixed, own = load_file(four / "model.safetensors"), load_file(eight / "model.safetensors")
    save_file(mixed | {name: own[name] for name in own if name.startswith(layer)}, four / "model.safetensors")
    config = json.loads((four / "config.json").read_text())
    config["quantization"][layer] = {"group_size": 32, "bits": 8}
    (four / "config.json").write_text(json.dumps(config))
    found = open_model(four).tensors
    torch.testing.assert_close(found.read(DOWN), load_file(truth / "model.safetensors")[DOWN])
    assert found.packed(DOWN, slice(0, 0), slice(0, 1)).bits == 8
    assert found.packed(KEY, slice(0, 0), slice(0, 1)).bits == 4


@pytest.mark.parametrize(
    ("ours", "theirs"), [("mlp.experts.{}.up_proj", "mlp"), ("block_sparse_moe.experts.{}.w3", "block_sparse_moe")]
)
def test_experts_of_mlx_lie_in_one_tensor(tmp_path: Path, ours: str, theirs: str) -> None:
    folder, _ = write(tmp_path, mlx())
    stored, truth = zip(*(mlx().store(torch.randn(40, 192)) for _ in range(3)), strict=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for kind in stored[0]:
        tensors[f"model.layers.0.{theirs}.switch_mlp.up_proj.{kind}"] = torch.stack([parts[kind] for parts in stored])
    save_file(tensors, path)
    source = open_model(folder).tensors
    for expert, weight in enumerate(truth):
        name = f"model.layers.0.{ours.format(expert)}.weight"
        assert name in source.names()
        torch.testing.assert_close(source.read(name, slice(3, 33), slice(5, 127)), weight[3:33, 5:127])


def test_a_bias_that_is_not_zero_is_missed(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, gptq())
    path = folder / "model.safetensors"
    bias = DOWN.replace("weight", "bias")
    assert bias not in open_model(folder).tensors.names()
    assert not open_model(folder).tensors.read(bias).any()  # for a model with biases
    save_file(load_file(path) | {bias: torch.ones(192)}, path)
    assert bias in open_model(folder).tensors.names()


def test_the_fingerprint_covers_every_part(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, gptq())
    before = open_model(folder).fingerprint
    path = folder / "model.safetensors"
    scales = DOWN.replace("weight", "scales")
    tensors = load_file(path)
    tensors[scales][0, 0] *= 2
    save_file(tensors, path)
    assert open_model(folder).fingerprint != before


PARTS = {
    "gptq without zeros": (gptq(), {"qzeros": None}, r"tensor '.*down_proj\.qzeros' is missing"),
    "gptq with other groups": (gptq(), {"scales": torch.ones(3, 192)}, r"scales' is F32 \[3, 192\]; .* \[10, 192\]"),
    "gptq of floats": (gptq(), {"qweight": torch.ones(40, 192)}, r"qweight' is F32 \[40, 192\]; .* I32 \[40, 192\]"),
    "gptq in a cube": (gptq(), {"qweight": torch.ones(2, 2, 2)}, r"not that of a matrix"),
    "a short order": (gptq(), {"g_idx": torch.zeros(5, dtype=torch.int32)}, r"g_idx' is I32 \[5\]; .* I32 \[320\]"),
    "awq with other zeros": (awq(), {"qzeros": torch.ones(10, 192)}, r"qzeros' is F32 \[10, 192\]; .* I32 \[10, 24\]"),
    "mlx without biases": (mlx(), {"biases": None}, r"tensor '.*down_proj\.biases' is missing"),
    "mlx with short rows": (mlx(), {"weight": torch.ones(192, 3)}, r"weight' is F32 .*; .* U32 \[192, 40\]"),
    "mlx in a vector": (mlx(), {"scales": torch.ones(9)}, r"scales' has the shape \[9\]"),
    "fp8 without scales": (fp8(), {"weight_scale_inv": None}, r"weight' is of type F8_E4M3, and has no weight_scale"),
    "fp8 with other blocks": (
        fp8(100, 48),
        {"weight_scale_inv": torch.ones(7, 7)},
        r"scale_inv' is F32 \[7, 7\]; the matrix \[192, 320\] needs one scale, one a row or one for every 100 by 48",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    method, parts, message = PARTS[name]
    folder, _ = write(tmp_path, method)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for kind, tensor in parts.items():
        tensors[DOWN.replace("weight", kind)] = tensor
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(ModelError, match=message):
        open_model(folder)


def test_an_order_of_groups_that_are_not_there(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, gptq())
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[DOWN.replace("weight", "g_idx")][7] = 10
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"tensor '.*down_proj\.g_idx' names a group that is not there"):
        open_model(folder).tensors.read(DOWN)


@pytest.mark.parametrize(
    ("method", "denied"), [(gptq(symmetric=False), {"sym": True}), (gptq(act=True), {"desc_act": False})]
)
def test_codes_that_config_json_tells_wrong_are_read_and_not_packed(
    tmp_path: Path, method: Method, denied: dict[str, Any]
) -> None:
    config = {"quantization_config": method.config["quantization_config"] | denied}
    folder, truth = write(tmp_path, method._replace(config=config))
    source = open_model(folder).tensors
    assert torch.equal(source.read(DOWN), load_file(truth / "model.safetensors")[DOWN])
    with pytest.raises(ModelError, match=rf"down_proj\.qweight' has .* config\.json \({next(iter(denied))}\) denies"):
        source.packed(DOWN, slice(0, 8), slice(0, 10))


CONFIGS: list[tuple[Any, str]] = [
    ({"quant_method": "bitsandbytes"}, r"quantized by 'bitsandbytes' are not supported; gptq.*Use the unquantized"),
    ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, r"in the format 'pack-quantized' are not"),
    ({}, r"quantized by None are not supported"),
    ({"quant_method": "gptq", "bits": 3}, r"3 bits in groups of 128 are not supported; 4 and 8"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 0}, r"in groups of 0 are not supported"),
    ({"quant_method": "gptq", "bits": 4, "group_size": 1 << 80}, r"in groups of 1208925819614629174706176 are not"),
    ({"quant_method": "gptq", "bits": "4"}, r"quantization_config: Expected `int`"),
    ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, r"in the layout 'marlin' is not supported"),
    ({"quant_method": "awq", "bits": 4, "version": "gemv"}, r"in the layout 'gemv' is not supported; gemm is"),
    ({"quant_method": "awq", "bits": 8}, r"awq in 8 bits is not supported"),
    (["gptq"], r"quantization_config: Expected `object`"),
    (None, r"is of type I32, and config\.json does not say how it is quantized; without that, supported are F64"),
]


@pytest.mark.parametrize(("described", "message"), CONFIGS)
def test_settings_that_are_not_understood(tmp_path: Path, described: Any, message: str) -> None:
    folder, _ = write(tmp_path, Method({"quantization_config": described}, gptq().store, None))
    with pytest.raises(ModelError, match=message) as caught:
        open_model(folder)
    assert "\n" not in str(caught.value)


def test_modes_of_mlx(tmp_path: Path) -> None:
    described = {"quantization": {"group_size": 32, "bits": 4, "mode": "mxfp4"}}
    folder, _ = write(tmp_path, mlx()._replace(config=described))
    with pytest.raises(ModelError, match="in the mode 'mxfp4' are not supported; affine is"):
        open_model(folder)


@pytest.mark.parametrize("method", [gptq(), mlx(), fp8()], ids=["gptq", "mlx", "fp8"])
def test_opening_needs_no_torch(tmp_path: Path, method: Method) -> None:
    folder, _ = write(tmp_path, method)
    code = (
        f"import sys; from ringlm.weights import open_model; open_model({str(folder)!r}); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_model_s_own_configuration_is_read(tmp_path: Path) -> None:
    folder, _ = write(tmp_path, gptq())
    assert read_config(open_model(folder).config).hidden_size == 192
