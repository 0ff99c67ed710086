"""The sharded Llama against transformers, in float32, on tiny random models of odd sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.errors import ConfigError, ModelError
from ringlm.models.batch import Batch
from ringlm.parallel.communicator import Alone
from ringlm.weights import open_model
from tests.models.reference import (
    assert_same,
    expected,
    generate,
    load,
    logits_of,
    prompt,
    ring_greedy,
    save,
    transformers_greedy,
)
from tests.parallel.local import run_ranks

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "llama3 rope": {"rope_parameters": LLAMA3, "head_dim": 16},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}},
    "every head its own keys": {"hidden_size": 35, "num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": 6},
    "one key head": {"hidden_size": 35, "num_attention_heads": 7, "num_key_value_heads": 1, "head_dim": 10},
    "even": {"hidden_size": 40, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 160},
}
PROMPTS = [prompt(11), prompt(1, seed=1), prompt(43, seed=2)]
COUNT = 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each variant's folder and transformers' answers."""
    root = tmp_path_factory.mktemp("models")
    folders = {name: save(root / name.replace(" ", "-"), **changes) for name, changes in VARIANTS.items()}
    return {name: (folder, expected(folder, PROMPTS, COUNT)) for name, folder in folders.items()}


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers(models: dict[str, Any], variant: str, world_size: int) -> None:
    folder, theirs = models[variant]
    assert_same(ring_greedy(folder, world_size, PROMPTS, COUNT), theirs)


@pytest.mark.parametrize("world_size", [5, 7, 9])
def test_more_ranks_than_key_value_heads(models: dict[str, Any], world_size: int) -> None:
    folder, theirs = models["biases" if world_size == 5 else "plain"]
    assert_same(ring_greedy(folder, world_size, PROMPTS, 16), [type(t)(t.tokens[:16], t.logits[:16]) for t in theirs])


@pytest.mark.parametrize("weights", [(2, 1), (1, 5), (1, 0), (0, 1), (3, 0, 1), (0, 1, 1, 1, 1)])
def test_unequal_splits(models: dict[str, Any], weights: tuple[float, ...]) -> None:
    folder, theirs = models["biases"]
    assert_same(ring_greedy(folder, len(weights), PROMPTS, COUNT, weights=weights), theirs)


@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("world_size", [1, 2])
def test_prefill_in_chunks(models: dict[str, Any], world_size: int, chunk: int) -> None:
    folder, theirs = models["llama3 rope"]
    assert_same(ring_greedy(folder, world_size, PROMPTS, COUNT, chunk=chunk), theirs)


@pytest.mark.parametrize("chunk", [1 << 30, 300, 256, 37])
def test_prompts_longer_than_a_block_of_queries(models: dict[str, Any], chunk: int) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = models["plain"]
    prompts = [prompt(700, seed=3), prompt(257, seed=4), prompt(256, seed=5)]
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = [transformers_greedy(reference, tokens, 8) for tokens in prompts]
    assert_same(ring_greedy(folder, 2, prompts, 8, chunk=chunk), theirs)


@pytest.mark.parametrize("world_size", [1, 4])
def test_every_position_of_a_forced_text(models: dict[str, Any], world_size: int) -> None:
    from transformers import AutoModelForCausalLM

    folder, _ = models["even"]
    tokens = prompt(97, seed=6)
    with torch.inference_mode():
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([tokens])).logits[0]
    files = open_model(folder)

    def body(comm: Any) -> torch.Tensor:
        model = load(files, comm)
        return logits_of(model, comm, Batch.of([(tokens, 0, [0, 1])], range(len(tokens))), model.new_cache(2))

    for ours in run_ranks(world_size, body):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_and_many_files(tmp_path: Path, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "half", dtype=dtype, shard="10KB", tie_word_embeddings=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_same(ring_greedy(folder, 2, PROMPTS, COUNT), expected(folder, PROMPTS, COUNT))


@pytest.mark.parametrize("world_size", [1, 3])
def test_computing_in_bfloat16_stays_close(models: dict[str, Any], world_size: int) -> None:
    folder, theirs = models["plain"]
    files = open_model(folder)

    def body(comm: Any) -> torch.Tensor:
        model = load(files, comm, dtype=torch.bfloat16)
        return generate(model, comm, PROMPTS, 1)[2].logits[0]

    reference = theirs[2].logits[0]
    for ours in run_ranks(world_size, body):
        assert torch.cosine_similarity(ours, reference, dim=0) > 0.995


def test_a_step_reduces_twice_a_layer_and_once_for_the_embedding(models: dict[str, Any]) -> None:
    files = open_model(models["biases"][0])

    def body(comm: Any) -> dict[str, int]:
        model = load(files, comm)
        model.forward(Batch.of([(prompt(9), 0, [0])], [8]), model.new_cache(1))
        return dict(comm.calls)

    assert run_ranks(3, body) == [{"all_reduce": 2 * 2 + 1}] * 3


def test_a_step_that_wants_no_logits(models: dict[str, Any]) -> None:
    model = load(open_model(models["plain"][0]), Alone())
    assert model.forward(Batch.of([(prompt(9), 0, [0])], []), model.new_cache(1)).shape == (0, 131)


def test_positions_outside_the_cache_are_refused(models: dict[str, Any]) -> None:
    model = load(open_model(models["plain"][0]), Alone())
    cache = model.new_cache(2, 16)
    model.forward(Batch.of([([1, 2], 14, [1])], [1]), cache)
    for start, block in ((15, 0), (0, 2), (0, -1)):
        with pytest.raises(IndexError):
            model.forward(Batch.of([([1, 2], start, [block])], [1]), cache)


def test_each_rank_holds_its_share_and_progress_reaches_it(models: dict[str, Any]) -> None:
    files = open_model(models["tied"][0])
    whole = load(files, Alone())
    assert whole.nbytes == files.tensors.nbytes

    def body(comm: Any) -> tuple[int, list[tuple[int, int]]]:
        heard: list[tuple[int, int]] = []
        model = load(files, comm, progress=lambda done, total: heard.append((done, total)))
        return model.nbytes, heard

    shares = run_ranks(3, body)
    norms = (2 * 2 + 1) * 36 * 4
    assert sum(nbytes for nbytes, _ in shares) == whole.nbytes + 2 * norms  # norms are on every rank
    for nbytes, heard in shares:
        assert heard[-1] == (nbytes, nbytes)
        assert heard == sorted(heard)


def test_the_tied_head_is_the_embedding(models: dict[str, Any]) -> None:
    model = load(open_model(models["tied"][0]), Alone())
    assert model._head.matrix is model._embedding.matrix


def test_too_many_ranks(models: dict[str, Any]) -> None:
    files = open_model(models["plain"][0])
    with pytest.raises(ConfigError, match=r"^world size 10 needs at least 10 query heads; model 'plain' has 9\. "):
        run_ranks(10, lambda comm: load(files, comm))


def test_a_wrong_shape_is_named_before_anything_is_read(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"intermediate_size": 50', '"intermediate_size": 51'))
    heard: list[tuple[int, int]] = []
    message = (
        r"model\.safetensors: tensor 'model\.layers\.0\.mlp\.gate_proj\.weight' has the shape \[50, 36\]; "
        r"config\.json makes it \[51, 36\]\."
    )
    with pytest.raises(ModelError, match=message):
        load(open_model(folder), Alone(), progress=lambda done, total: heard.append((done, total)))
    assert not heard


def test_a_missing_and_a_superfluous_tensor_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ModelError, match=r"m: tensor 'model\.layers\.2\.input_layernorm\.weight' is missing\."):
        load(open_model(folder), Alone())
    (folder / "config.json").write_text(text.replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(ModelError, match=r"tensor 'model\.layers\.1\.\S+' has no place in this model"):
        load(open_model(folder), Alone())


def test_the_last_layer_computes_only_what_is_asked_for() -> None:
    """Of a prompt whose last logits are wanted its MLP sees one row, and the last of each other sequence."""
    batch = Batch.of([([1, 2, 3], 0, (0,)), ([4, 5], 7, (1,))], wanted=[1])
    assert batch.kept is not None
    assert batch.kept.tolist() == [1, 2, 4]
    assert Batch.of([([1], 3, (0,)), ([2], 9, (1,))], wanted=[0, 1]).kept is None
