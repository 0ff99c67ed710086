"""A real model, SmolLM2-135M in Q4_1: 9 query heads and 3 key-value heads, so two ranks are unequal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.models.batch import Batch
from ringlm.parallel.communicator import Alone
from ringlm.weights import open_model
from tests.models.reference import Greedy, assert_same, generate, load, transformers_greedy
from tests.parallel.local import run_ranks

# "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
PROMPT = [1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198]


@pytest.fixture(scope="module")
def reference(demo_gguf: Path) -> tuple[Greedy, torch.Tensor]:
    """transformers' 64 greedy tokens, and its logits at every position of the prompt."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(demo_gguf.parent, gguf_file=demo_gguf.name, dtype=torch.float32)
    with torch.inference_mode():
        return transformers_greedy(model, PROMPT, 64), model(torch.tensor([PROMPT])).logits[0]


@pytest.mark.slow
def test_logits_equal_transformers(demo_gguf: Path, reference: tuple[Greedy, torch.Tensor]) -> None:
    model = load(open_model(demo_gguf), Alone())
    ours = model.forward(Batch.of([(PROMPT, 0, [0])], range(len(PROMPT))), model.new_cache(1))
    torch.testing.assert_close(ours, reference[1], atol=1e-3, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_64_greedy_tokens_equal_transformers(
    demo_gguf: Path, reference: tuple[Greedy, torch.Tensor], world_size: int
) -> None:
    files = open_model(demo_gguf)
    (ours, *_) = run_ranks(world_size, lambda comm: generate(load(files, comm), comm, [PROMPT], 64))
    assert_same(ours, [reference[0]], tolerance=1e-3)
    assert ours[0].tokens == reference[0].tokens
