"""GGUF tensors, whole and by slice, against gguf's own dequantization."""

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
from ringlm.weights import GGUFHeader, open_model
from tests.models.reference import assert_same, expected, prompt, ring_greedy, save
from tests.models.test_packing import apart, logits
from tests.weights.write_gguf import TYPES, header, tensor, write_model, write_tensors


@pytest.fixture(scope="module", params=TYPES)
def example(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, dict[str, Any]]:
    """A source of one type, and its tensors by Hugging Face name as gguf dequantizes them, in Hugging Face order."""
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    raw = write_tensors(path, request.param)
    truth = {name: gguf.quants.dequantize(data, TYPES[request.param]) for name, data in raw.items()}
    return open_model(path).tensors, truth


def test_whole_tensors(example: tuple[Any, dict[str, Any]]) -> None:
    source, truth = example
    assert set(source.names()) == set(truth)
    for name, data in truth.items():
        assert source.shape(name) == data.shape
        got = source.read(name, dtype=torch.float32)
        assert got.is_contiguous()
        assert np.array_equal(got.numpy(), data)
        half = source.read(name, dtype=torch.bfloat16)
        assert torch.equal(half, torch.from_numpy(np.array(data)).to(torch.bfloat16))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_slice(example: tuple[Any, dict[str, Any]], data: st.DataObject) -> None:
    source, truth = example
    name = data.draw(st.sampled_from(sorted(truth)))
    cuts = tuple(
        slice(*sorted(data.draw(st.tuples(st.integers(0, size), st.integers(0, size))))) for size in truth[name].shape
    )
    got = source.read(name, *cuts, dtype=torch.float32)
    assert got.is_contiguous()
    assert np.array_equal(got.numpy(), truth[name][cuts])


def test_tiles_join(example: tuple[Any, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    source, truth = example
    monkeypatch.setattr("ringlm.weights.gguf._TILE", 200)  # two rows of 96
    for name, data in truth.items():
        columns = slice(5, 70) if data.ndim == 2 else None
        got = source.read(name, slice(1, 6), columns, torch.float32).numpy()
        assert np.array_equal(got, data[1:6, 5:70] if data.ndim == 2 else data[1:6])


def test_slices_outside_are_refused(example: tuple[Any, dict[str, Any]]) -> None:
    source, _ = example
    for rows in (slice(0, 8), slice(-1, 3), slice(3, 1), slice(0, 4, 2)):
        with pytest.raises(ValueError, match="is not a part of 7"):
            source.read("model.embed_tokens.weight", rows)
    with pytest.raises(ModelError, match=r"\.gguf: tensor 'model\.nothing' is missing\."):
        source.read("model.nothing")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True, "mlp_bias": True},
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
            "head_dim": 16,
        },
    ],
    ids=["untied", "tied", "biases", "llama3 rope"],
)
def test_a_converted_model_answers_as_its_original(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = save(tmp_path / "original", **changes)
    path = write_model(folder, tmp_path / "converted.gguf")
    prompts = [prompt(50), prompt(3, seed=1)]
    theirs = expected(folder, prompts, 16)
    for world_size in (1, 2, 4):
        assert_same(ring_greedy(path, world_size, prompts, 16), theirs)


def test_block_straddling_cuts_answer_as_one_rank(tmp_path: Path) -> None:
    changes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "head_dim": 16}
    folder = save(tmp_path / "original", **changes)
    kinds = {"down_proj": "Q4_0", "o_proj": "Q8_0", "embed_tokens": "BF16", "up_proj": "F16"}
    path = write_model(folder, tmp_path / "mixed.gguf", kinds, default="Q4_1")
    prompts = [prompt(20), prompt(5, seed=1)]
    alone = ring_greedy(path, 1, prompts, 12)
    for world_size in (2, 3, 5):
        assert_same(ring_greedy(path, world_size, prompts, 12), alone)


def test_metadata_read_as_gguf_reads_them(demo_gguf: Path) -> None:
    ours = GGUFHeader(demo_gguf)
    theirs = gguf.GGUFReader(demo_gguf)
    for key, value in ours.metadata.items():
        field = theirs.fields[key]
        assert (len(value) == len(field.data)) if isinstance(value, list) else (value == field.contents())
    tokens = theirs.fields["tokenizer.ggml.tokens"]
    assert ours.metadata["tokenizer.ggml.tokens"][:2000] == [
        bytes(tokens.parts[index]).decode() for index in tokens.data[:2000]
    ]
    for other in theirs.tensors:
        info = ours.tensors[other.name]
        assert (info.offset, info.nbytes) == (other.data_offset, other.n_bytes)
        assert info.shape == tuple(int(size) for size in other.shape[::-1])
        assert info.ggml_type == other.tensor_type.name


def test_an_unsupported_type_is_named(tmp_path: Path) -> None:
    path = tmp_path / "k.gguf"
    path.write_bytes(header((), (tensor("blk.0.ffn_up.weight", (256, 2), 10, 0),), data=bytes(168)))
    with pytest.raises(
        ModelError, match=r"k\.gguf: tensor 'blk\.0\.ffn_up\.weight' is of type Q2_K; supported are F32"
    ):
        GGUFHeader(path)


GEMMA = {"num_hidden_layers": 7, "sliding_window": 7, "pad_token_id": None, "query_pre_attn_scalar": 4}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.5],
    "long_factor": [1.5, 3.0, 9.0],
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2 with yarn": ("Qwen2", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", GEMMA | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 9.0}),
    "gemma3": ("Gemma3", GEMMA),
    "phi3": ("Phi3", {"sliding_window": 9, "pad_token_id": None}),
    "phi4": (
        "Phi3",
        {
            "hidden_size": 72,
            "head_dim": 8,
            "pad_token_id": None,
            "original_max_position_embeddings": 32,
            "rope_parameters": LONG,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 5, "pad_token_id": None}),
    "olmo2": ("Olmo2", {"seed": 1}),
    "mixtral": ("Mixtral", {"num_local_experts": 7}),
    "qwen3 moe": ("Qwen3Moe", {"num_experts": 9, "norm_topk_prob": True, "moe_intermediate_size": 19}),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_answers_as_its_original(tmp_path: Path, name: str) -> None:
    family, changes = FAMILIES[name]
    folder = save(tmp_path / "original", family=family, **changes)
    path = write_model(folder, tmp_path / "converted.gguf")
    prompts = [prompt(50), prompt(40, seed=1)]
    theirs = expected(folder, prompts, 12)
    for world_size in (1, 3):
        assert_same(ring_greedy(path, world_size, prompts, 12), theirs)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_experts_are_near_the_original(tmp_path: Path, kind: str) -> None:
    changes = {"hidden_size": 96, "head_dim": 16, "num_attention_heads": 6, "moe_intermediate_size": 64}
    folder = save(tmp_path / "original", family="Qwen3Moe", **changes, num_experts=7, num_experts_per_tok=3)
    files = open_model(write_model(folder, tmp_path / "model.gguf", default=kind))
    exact = logits(files, 1, [40])
    for world_size in (1, 3):
        assert apart(logits(files, world_size, [38, 1, 1], bits=4), exact) < 0.1


def test_packed_codes_of_fused_tensors_are_near_the_original(tmp_path: Path) -> None:
    changes = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "pad_token_id": None}
    folder = save(tmp_path / "original", family="Phi3", head_dim=16, **changes)
    path = write_model(folder, tmp_path / "phi3.gguf", default="Q4_1")
    alone = ring_greedy(path, 1, [prompt(20)], 12)
    for world_size in (2, 3):
        assert_same(ring_greedy(path, world_size, [prompt(20)], 12), alone)
