"""Damaged and hostile GGUF files: a ModelError that names file and place, and no memory for what they claim."""

from __future__ import annotations

import contextlib
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringlm.errors import ModelError
from ringlm.weights import GGUFHeader, open_model
from tests.models.reference import save
from tests.weights.write_gguf import field, header, string, tensor, write_model

HUGE = (1 << 64) - 1
U32, F32, STRING, ARRAY = 4, 6, 8, 9
ARCH = field("general.architecture", STRING, string("llama"))

FILES = {
    "empty": (b"", "not a GGUF file"),
    "another format": (header(magic=b"GGML"), "not a GGUF file"),
    "too short": (b"GGUF\x03\0\0", "the version ends at byte"),
    "version 1": (header(version=1), "version 1 is not supported"),
    "big-endian": (header(version=3 << 24), "or big-endian"),
    "many tensors": (header(counts=(HUGE, 0)), "18,446,744,073,709,551,615 tensors do not fit"),
    "many keys": (header(counts=(0, HUGE)), "metadata keys do not fit"),
    "a key longer than the file": (header((struct.pack("<Q", HUGE),), counts=(0, 1), data=bytes(64)), "bytes long"),
    "a string longer than the file": (header((field("a", STRING, struct.pack("<Q", HUGE)),)), "'a' ends at byte"),
    "a long array": (header((field("a", ARRAY, struct.pack("<IQ", U32, HUGE)),)), "elements of 'a' do not fit"),
    "a long array of strings": (header((field("a", ARRAY, struct.pack("<IQ", STRING, HUGE)),)), "do not fit"),
    "strings past the end": (
        header((field("a", ARRAY, struct.pack("<IQ", STRING, 2) + struct.pack("<QQ", HUGE, 1)),)),
        "the array 'a' ends",
    ),
    "an array of arrays": (header((field("a", ARRAY, struct.pack("<IQ", ARRAY, 1)),)), "unknown type 9"),
    "an unknown value type": (header((field("a", 77, b""),)), "unknown type 77"),
    "a key twice": (header((ARCH, ARCH)), "comes twice"),
    "a key that is not text": (header((string(b"\xff\xfe") + struct.pack("<II", U32, 1),)), "not UTF-8"),
    "alignment 0": (header((field("general.alignment", U32, struct.pack("<I", 0)),)), "general.alignment is 0"),
    "alignment 24": (header((field("general.alignment", U32, struct.pack("<I", 24)),)), "power of two"),
    "alignment text": (header((field("general.alignment", STRING, string("32")),)), "general.alignment is '32'"),
    "no dimensions": (header((), (tensor("t", (), 0, 0),)), "tensor 't' has 0 dimensions"),
    "many dimensions": (header((), (tensor("t", (1,) * 9, 0, 0),)), "tensor 't' has 9 dimensions"),
    "an empty dimension": (header((), (tensor("t", (0, 4), 0, 0),)), "tensor 't' has the shape"),
    "overflowing dimensions": (header((), (tensor("t", (1 << 63, 1 << 63, 4), 0, 0),)), "tensor 't' ends at byte"),
    "past the end": (
        header((), (tensor("t", (4, 4), 0, 0),), data=bytes(63)),
        "ends at byte 160, the file at 159",
    ),
    "an offset past the end": (header((), (tensor("t", (4,), 0, HUGE - 31),)), "tensor 't' ends at byte"),
    "an offset between alignments": (header((), (tensor("t", (4,), 0, 8),), data=bytes(64)), "not a multiple of 32"),
    "half a block": (header((), (tensor("t", (40, 2), 2, 0),), data=bytes(99)), "not rows in blocks of 32"),
    "half a block of 256": (header((), (tensor("t", (128, 2), 12, 0),), data=bytes(144)), "not rows in blocks of 256"),
    "blocks past the end": (
        header((), (tensor("t", (512, 1), 14, 0),), data=bytes(419)),
        "ends at byte 516, the file at 515",
    ),
    "a tensor twice": (header((), (tensor("t", (4,), 0, 0),) * 2, data=bytes(64)), "tensor 't' comes twice"),
    "a type of the future": (header((), (tensor("t", (4,), 999, 0),)), "type 999, which is unknown"),
    "no architecture": (header(), "architecture None is not supported"),
    "an unknown architecture": (
        header((field("general.architecture", STRING, string("rwkv7")),)),
        "architecture 'rwkv7' is not supported; known are llama",
    ),
    "no head count": (header((ARCH,)), "metadata llama.attention.head_count is missing; a int is needed"),
    "a head count in text": (
        header((ARCH, field("llama.attention.head_count", STRING, string("nine")))),
        "head_count is 'nine'",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_each_is_refused_by_name(tmp_path: Path, name: str) -> None:
    content, message = FILES[name]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError) as caught:
            open_model(path)
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()
    assert message in str(caught.value)
    assert str(caught.value).startswith("bad.gguf: ")
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("hostile")
    return write_model(save(folder / "m", num_hidden_layers=1), folder / "m.gguf").read_bytes()


@pytest.mark.parametrize("kept", [0.01, 0.2, 0.5, 0.9, 0.999])
def test_cut_anywhere(tmp_path: Path, whole: bytes, kept: float) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"^cut\.gguf: "):
        open_model(path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bytes_raise_nothing_but_a_model_error(tmp_path: Path, whole: bytes, data: st.DataObject) -> None:
    damaged = bytearray(whole)
    flips = st.tuples(st.integers(0, 4000), st.integers(0, 255))
    for place, value in data.draw(st.lists(flips, min_size=1, max_size=9)):
        damaged[place] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(bytes(damaged))
    with contextlib.suppress(ModelError):
        found = GGUFHeader(path)
        for key in found.metadata:
            found.metadata[key]
        open_model(path)
