"""GGUF's blocks as packed matrices: the file's own codes, by slice, against what `read` and gguf make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringlm.errors import ModelError
from ringlm.weights import open_model
from ringlm.weights.blocks import _DECODERS, dequantize
from ringlm.weights.blocks import packed as blocks_packed
from ringlm.weights.gguf_header import BLOCK_FORMATS
from ringlm.weights.packed import BLOCK, Packed, unpack
from tests.weights.write_gguf import K_TYPES, write_tensors

BITS = {"Q4_0": 4, "Q4_1": 4, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8, "Q4_K": 4, "Q5_K": 8, "Q6_K": 8} | {
    "IQ4_NL": 8,
    "MXFP4": 8,
}
WITH_MINIMUMS = {"Q4_1", "Q5_1", "Q4_K", "Q5_K"}
EMBEDDING, QUERY, KEY = "model.embed_tokens.weight", *(f"model.layers.0.self_attn.{n}_proj.weight" for n in "qk")


class Example:
    def __init__(self, kind: str, folder: Path) -> None:
        self.kind = kind
        self.raw = write_tensors(folder / f"{kind}.gguf", kind)
        self.source = open_model(folder / f"{kind}.gguf").tensors

    def packed(self, name: str, rows: slice | None = None, blocks: slice | None = None) -> Packed:
        height, columns = self.source.shape(name)
        found = self.source.packed(name, rows or slice(0, height), blocks or slice(0, columns // BLOCK))
        assert found is not None
        return found


@pytest.fixture(scope="module", params=BITS)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Example:
    return Example(request.param, tmp_path_factory.mktemp("blocks"))


def codes(packed: Packed) -> torch.Tensor:
    """As stored, float32 (rows, columns)."""
    return unpack(packed._replace(scales=torch.ones_like(packed.scales), minimums=torch.zeros_like(packed.scales)))


def test_every_block_format_of_the_header_has_a_decoder() -> None:
    assert set(_DECODERS) == set(BITS) == {name for name, block, _ in BLOCK_FORMATS.values() if block > 1}
    for name, block, nbytes in BLOCK_FORMATS.values():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]] == (block, nbytes)


def test_forms(example: Example) -> None:
    for name in (EMBEDDING, QUERY, KEY):
        rows, columns = example.source.shape(name)
        packed = example.packed(name)
        blocks = columns // BLOCK
        assert packed.bits == BITS[example.kind]
        assert packed.codes.shape == (rows, blocks, 16 if packed.bits == 4 else 32)
        assert packed.codes.dtype is (torch.uint8 if packed.bits == 4 else torch.int8)
        figures = [packed.scales] + ([] if packed.minimums is None else [packed.minimums])
        assert len(figures) == 1 + (example.kind in WITH_MINIMUMS)
        assert all(tensor.shape == (rows, blocks) and tensor.dtype is torch.float16 for tensor in figures)
        empty = example.packed(name, slice(0, 0), slice(0, blocks))
        assert empty.codes.shape == (0, *packed.codes.shape[1:])
        assert (empty.bits, empty.minimums is None) == (packed.bits, packed.minimums is None)
        assert example.packed(name, slice(0, 3), slice(1, 1)).codes.shape[:2] == (3, 0)


def test_types_in_blocks_of_32_lose_nothing(example: Example) -> None:
    if example.kind in K_TYPES:
        pytest.skip("blocks of 256")
    for name in (EMBEDDING, QUERY, KEY):
        assert torch.equal(unpack(example.packed(name)), example.source.read(name))


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K"])
def test_k_types_keep_their_codes_and_round_their_scales(kind: str, tmp_path: Path) -> None:
    example = Example(kind, tmp_path)
    for name in (EMBEDDING, QUERY, KEY):
        raw = example.raw[name].reshape(-1, BLOCK_BYTES[kind])
        d, dmin = (raw[:, at : at + 2].copy().view(np.float16).astype(np.float32) for at in (0, 2))
        sc, m = gguf.quants.Q4_K.get_scale_min(raw[:, 4:16])
        packed = example.packed(name)
        assert packed.minimums is not None
        scales, minimums = (d * sc).reshape(packed.scales.shape), (-dmin * m).reshape(packed.scales.shape)
        assert np.array_equal(packed.scales.numpy(), scales.astype(np.float16))
        assert np.array_equal(packed.minimums.numpy(), minimums.astype(np.float16))
        exact = packed._replace(scales=torch.from_numpy(scales), minimums=torch.from_numpy(minimums))
        truth = example.source.read(name)
        assert torch.equal(unpack(exact), truth)
        error = (unpack(packed) - truth).abs().unflatten(1, (-1, BLOCK)).amax(2).numpy()
        assert (error <= 2.0**-11 * ((15 if kind == "Q4_K" else 31) * scales + abs(minimums))).all()


def test_q6_k_keeps_the_codes_of_the_larger_scale(tmp_path: Path) -> None:
    example = Example("Q6_K", tmp_path)
    for name in (EMBEDDING, QUERY, KEY):
        raw = example.raw[name].reshape(-1, BLOCK_BYTES["Q6_K"])
        scales = raw[:, 192:208].view(np.int8) * raw[:, 208:210].copy().view(np.float16).astype(np.float32)
        packed = example.packed(name)
        truth = example.source.read(name).view(-1, 2, 16)
        scales = torch.from_numpy(scales).view(-1, 2)
        larger = scales.abs().argmax(1)
        every = torch.arange(len(larger))
        wanted = 4 * (truth[every, larger] / scales[every, larger].unsqueeze(1))
        assert torch.equal(codes(packed).view(-1, 2, 16)[every, larger], wanted.nan_to_num().round())
        error = (unpack(packed).view(-1, 2, 16) - truth).abs().amax((1, 2))
        step = scales.abs().amax(1) / 4
        assert (error <= step * (0.5 + 129 * 2.0**-11)).all()  # to the nearest code, and the scale's own rounding


def test_the_scales_of_mxfp4_are_exact_where_float16_holds_them() -> None:
    blocks = torch.full((256, 17), 0x11, dtype=torch.uint8)
    blocks[:, 0] = torch.arange(256)
    truth = torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType.MXFP4))
    assert torch.equal(dequantize(blocks, "MXFP4"), truth)
    found = unpack(blocks_packed(blocks.unsqueeze(1), "MXFP4"))
    exponents = torch.arange(256) - 128
    held = (exponents >= -24) & (exponents < 16)
    assert torch.equal(found[held], truth[held])
    assert not found[exponents < -24].any()
    assert not found[exponents >= 16].isfinite().all(1).any()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice(example: Example, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from([EMBEDDING, QUERY, KEY]))
    rows, columns = example.source.shape(name)
    cuts = [
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size)))))
        for size in (rows, columns // BLOCK)
    ]
    part, whole = example.packed(name, *cuts), example.packed(name)
    for got, all_of_it in zip(part[1:], whole[1:], strict=True):
        assert (got is None and all_of_it is None) or torch.equal(got, all_of_it[tuple(cuts)])


def test_tiles_join(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = example.packed(QUERY)
    monkeypatch.setattr("ringlm.weights.blocks._TILE", 5 * example.raw[QUERY].shape[1])  # five rows of 24
    for got, wanted in zip(example.packed(QUERY), whole, strict=True):
        assert torch.equal(got, wanted) if isinstance(got, torch.Tensor) else got == wanted


def test_slices_outside_are_refused(example: Example) -> None:
    blocks = example.source.shape(EMBEDDING)[1] // BLOCK
    with pytest.raises(ValueError, match="is not a part of 7"):
        example.source.packed(EMBEDDING, slice(0, 8), slice(0, 1))
    with pytest.raises(ValueError, match=f"is not a part of {blocks}"):
        example.source.packed(EMBEDDING, slice(0, 1), slice(0, blocks + 1))
    with pytest.raises(ModelError, match=r"tensor 'model\.nothing' is missing"):
        example.source.packed("model.nothing", slice(0, 1), slice(0, 1))


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_floats_are_not_packed(kind: str, tmp_path: Path) -> None:
    write_tensors(tmp_path / "floats.gguf", kind)
    assert open_model(tmp_path / "floats.gguf").tensors.packed(EMBEDDING, slice(0, 7), slice(0, 3)) is None


def test_vectors_are_not_packed(example: Example) -> None:
    assert example.source.packed("model.norm.weight", slice(0, 1), slice(0, 1)) is None


def test_infinite_scales_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.gguf"
    raw: dict[str, Any] = write_tensors(path, "Q4_K")
    block = raw[EMBEDDING][0, :144].tobytes()
    content = bytearray(path.read_bytes())
    at = content.index(block)
    content[at : at + 2] = np.float16(60000).tobytes()  # finite itself, not times 63
    content[at + 4] |= 63
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"^huge\.gguf: tensor 'model\.embed_tokens\.weight' holds scales"):
        open_model(path).tensors.packed(EMBEDDING, slice(0, 7), slice(0, 16))


BLOCK_BYTES = {name: nbytes for name, _, nbytes in BLOCK_FORMATS.values()}
