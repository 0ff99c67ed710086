"""Embeddings beside answers in the same steps, with a fake model and with a real, tiny one against transformers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ringlm.engine.embedding import Vector
from ringlm.engine.engine import Engine
from ringlm.engine.follower import follow
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.engine.runner import Runner
from ringlm.errors import RequestError
from ringlm.parallel.communicator import Communicator
from ringlm.weights import open_model
from tests.engine.fake import CONTEXT, World, blocks_in_use, vector_after
from tests.engine.test_engine import GREEDY, greedy
from tests.models.reference import load, prompt, save
from tests.parallel.local import run_ranks


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [3, 64])
def test_vectors_and_answers_in_the_same_steps(world_size: int, token_budget: int) -> None:
    """Nobody sees the others, prompts come in chunks, and blocks come back."""
    texts = {1: [5, 6, 7, 8, 9], 2: [4], 3: [5, 6, 7, 8, 9], 5: list(range(CONTEXT - 2))}
    tokens: list[int] = []
    vectors: dict[int, np.ndarray] = {}
    with World(world_size, token_budget=token_budget) as world:
        world.engine.submit(0, [3, 1, 4], GREEDY)
        for id, text in texts.items():
            world.engine.embed(id, text)
        world.engine.embed(4, [1, 2])
        canceled = world.engine.cancel(4)
        assert canceled is not None
        assert canceled.finish_reason is StopReason.CANCELED
        while world.engine.has_work:
            for news in world.engine.step():
                if isinstance(news, Vector):
                    assert vectors.setdefault(news.id, news.values) is news.values
                else:
                    assert news.id == 0
                    tokens += news.tokens
        assert blocks_in_use(world.engine) == 0
    assert tokens == greedy([3, 1, 4], 6)
    assert set(vectors) == set(texts)
    for id, text in texts.items():
        assert vectors[id].dtype == np.float32
        np.testing.assert_allclose(vectors[id], vector_after(text), rtol=1e-6)


def test_no_logits_are_sent_for_a_vector() -> None:
    with World(2) as world:
        world.engine.embed(0, [1, 2, 3])
        (vector,) = world.engine.step()
        assert isinstance(vector, Vector)
        assert set(world.group.ranks[0].calls) == {"broadcast_bytes", "all_reduce"}


def test_a_state_that_is_not_finite_ends_its_request_alone() -> None:
    with World(1, poison=22) as world:
        world.engine.embed(0, [1, 22])
        world.engine.embed(1, [1, 2])
        bad, good = world.engine.step()
        assert blocks_in_use(world.engine) == 0
    assert bad.error is not None
    assert "last hidden state of request 0 is of length nan" in bad.error
    assert isinstance(good, Vector)


def test_texts_that_are_refused() -> None:
    with World(1) as world, pytest.raises(RequestError, match="The prompt is empty"):
        world.engine.embed(0, [])


TEXTS = [prompt(37), prompt(1, seed=2), prompt(19, seed=3)]
FAMILIES = ["Llama", "Gemma2", "Granite"]  # a plain norm, one with an offset, and one that runs through transformers


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    """A folder, and transformers' last hidden states of the last tokens, normalized."""
    from transformers import AutoModelForCausalLM

    folder = save(tmp_path_factory.mktemp("embedding") / request.param, family=request.param)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        states = [theirs(torch.tensor([text]), output_hidden_states=True).hidden_states[-1][0, -1] for text in TEXTS]
    return folder, [(state / state.norm()).numpy() for state in states]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("token_budget", [5, 512])
def test_vectors_are_transformers(model: tuple[Path, list[np.ndarray]], world_size: int, token_budget: int) -> None:
    folder, reference = model
    files = open_model(folder)

    def rank(comm: Communicator) -> dict[int, np.ndarray]:
        part = load(files, comm)
        runner = Runner(part, part.new_cache(16), comm)
        if comm.rank > 0:
            follow(runner, comm)
            return {}
        engine = Engine(runner, comm, max_seqs=4, token_budget=token_budget)
        engine.submit(9, prompt(8), SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True))
        for id, text in enumerate(TEXTS):
            engine.embed(id, text)
        vectors = {}
        while engine.has_work:
            vectors |= {news.id: news.values for news in engine.step() if isinstance(news, Vector)}
        engine.stop()
        return vectors

    vectors = run_ranks(world_size, rank)[0]
    for id, expected in enumerate(reference):
        np.testing.assert_allclose(vectors[id], expected, atol=2e-5)
