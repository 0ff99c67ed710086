"""A real model, SmolLM2-135M in Q4_1: 9 query heads and 3 key-value heads, so two ranks are unequal."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import gguf
import pytest
import torch

from ringlm.models.batch import Batch
from ringlm.parallel.communicator import Alone, Communicator
from ringlm.weights import open_model
from tests.models.reference import Greedy, assert_same, generate, load, transformers_greedy
from tests.parallel.local import run_ranks

# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


ANY = torch.randint(17, 40_000, (6, 40), generator=torch.Generator().manual_seed(0))


class Reference(NamedTuple):
    """What transformers makes of PROMPT: 64 greedy tokens, and logits at every position. And the last position's
    logits of ANY in two dtypes."""

    greedy: Greedy
    logits: torch.Tensor
    any: torch.Tensor
    any_in_bfloat16: torch.Tensor


@pytest.fixture(scope="module")
def reference(demo_gguf: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    # transformers reads the file twice, and lists gguf's names of tensors for each of its modules.
    cached = {name: functools.cache(getattr(gguf, name)) for name in ("GGUFReader", "get_tensor_name_map")}
    with mock.patch.multiple(gguf, **cached):
        folder, name = demo_gguf.parent, demo_gguf.name
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32)
    with torch.inference_mode():
        logits, exact = model(torch.tensor([PROMPT])).logits[0], model(ANY).logits[:, -1]
        greedy = transformers_greedy(model, PROMPT, 64)
        return Reference(greedy, logits, exact, model.bfloat16()(ANY).logits[:, -1].float())


@pytest.mark.slow
def test_logits_equal_transformers(demo_gguf: Path, reference: Reference) -> None:
    model = load(open_model(demo_gguf), Alone())
    ours = model.forward(Batch.of([(PROMPT, 0, [0])], range(len(PROMPT))), model.new_cache(1))
    torch.testing.assert_close(ours, reference.logits, atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_64_greedy_tokens_equal_transformers(demo_gguf: Path, reference: Reference, world_size: int) -> None:
    files = open_model(demo_gguf)
    (ours, *_) = run_ranks(world_size, lambda comm: generate(load(files, comm), comm, [PROMPT], 64))
    assert_same(ours, [reference.greedy], tolerance=1e-3)
    assert ours[0].tokens == reference.greedy.tokens


@pytest.mark.slow
def test_in_bfloat16_it_is_as_near_as_transformers_at_every_world_size(demo_gguf: Path, reference: Reference) -> None:
    files = open_model(demo_gguf)

    def last(comm: Communicator) -> torch.Tensor:
        model = load(files, comm, dtype=torch.bfloat16)
        batch = Batch.of([(tokens, 0, [row]) for row, tokens in enumerate(ANY.tolist())], range(39, 240, 40))
        return model.forward(batch, model.new_cache(6))

    theirs = (reference.any_in_bfloat16 - reference.any).square().mean().sqrt()
    for world_size in (1, 2, 3):
        ours = torch.cat(run_ranks(world_size, last), 1) - reference.any
        assert ours.square().mean().sqrt() < 1.2 * theirs
