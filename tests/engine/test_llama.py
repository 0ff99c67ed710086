"""The engine with a real, tiny Llama: chunked prompts and decodes in one batch, against transformers."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringlm.engine.engine import Engine
from ringlm.engine.follower import follow
from ringlm.engine.news import Output
from ringlm.engine.request import SamplingParams
from ringlm.engine.runner import Runner
from ringlm.models.sizes import BLOCK
from ringlm.parallel.communicator import Communicator
from ringlm.weights import open_model
from tests.models.reference import NEAR_TIE, Greedy, expected, load, prompt, save
from tests.parallel.local import run_ranks

PROMPTS = [prompt(37), prompt(3, seed=1), prompt(1, seed=2), prompt(19, seed=3)]
COUNT = 24
PARAMS = SamplingParams(temperature=0.0, max_tokens=COUNT, ignore_eos=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Greedy]]:
    folder = save(tmp_path_factory.mktemp("engine") / "llama")
    return folder, expected(folder, PROMPTS, COUNT)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [5, 512])
def test_greedy_tokens_are_transformers(llama: tuple[Path, list[Greedy]], world_size: int, token_budget: int) -> None:
    """With one place fewer than requests, and one of them canceled on the way and asked again."""
    folder, reference = llama
    files = open_model(folder)

    def rank(comm: Communicator) -> dict[int, list[int]]:
        model = load(files, comm)
        runner = Runner(model, model.new_cache(2 * model.config.context // BLOCK), comm)
        if comm.rank > 0:
            follow(runner, comm)
            return {}
        engine = Engine(runner, comm, max_seqs=3, token_budget=token_budget)
        tokens: dict[int, list[int]] = {id: [] for id in range(len(PROMPTS))}
        for id, ids in enumerate(PROMPTS):
            engine.submit(id, ids, PARAMS)
        for _ in range(3):
            for delta in engine.step():
                tokens[delta.id] += delta.tokens
        engine.cancel(0)
        tokens[0] = []
        engine.submit(0, PROMPTS[0], PARAMS)
        for delta in through(engine):
            tokens[delta.id] += delta.tokens
        engine.stop()
        assert engine.figures.blocks_in_use == 0
        return tokens

    tokens = run_ranks(world_size, rank)[0]
    for id, greedy in enumerate(reference):
        until = certain(greedy)
        assert tokens[id][:until] == greedy.tokens[:until]
        assert len(tokens[id]) == COUNT


def test_a_text_is_the_same_alone_and_among_sixteen_others_that_come_and_go(llama: tuple[Path, list[Greedy]]) -> None:
    """At two ranks; some begin as it does, and all end or are cancelled before it, beside it or after it."""
    folder, reference = llama
    files = open_model(folder)
    draw = random.Random(5)
    others = [
        (PROMPTS[0][: draw.randrange(8, 30)] if index % 4 == 0 else []) + prompt(draw.randrange(1, 40), seed=10 + index)
        for index in range(16)
    ]
    arrive = [draw.randrange(COUNT) for _ in others]
    leave = [at + draw.randrange(2, 12) if index % 3 == 0 else None for index, at in enumerate(arrive)]

    def rank(comm: Communicator) -> tuple[list[int], list[int], int]:
        model = load(files, comm)
        runner = Runner(model, model.new_cache(4 * model.config.context // BLOCK), comm)
        if comm.rank > 0:
            follow(runner, comm)
            return [], [], 0
        engine = Engine(runner, comm, max_seqs=8, token_budget=48)
        engine.submit(0, PROMPTS[0], PARAMS)
        alone = [token for delta in through(engine) for token in delta.tokens]
        crowd, most = list[int](), 0
        for turn in range(COUNT + 12):
            for index, ids in enumerate(others):
                if arrive[index] == turn:
                    engine.submit(2 + index, ids, PARAMS.replace(max_tokens=3 + 2 * index))
                if leave[index] == turn:
                    engine.cancel(2 + index)
            if turn == 4:
                engine.submit(1, PROMPTS[0], PARAMS)
            if engine.has_work:
                crowd += [token for delta in engine.step() if delta.id == 1 for token in delta.tokens]
                most = max(most, engine.figures.running)
        crowd += [token for delta in through(engine) if delta.id == 1 for token in delta.tokens]
        engine.stop()
        return alone, crowd, most

    alone, crowd, most = run_ranks(2, rank)[0]
    until = certain(reference[0])
    assert most >= 4, "the others hardly met it"
    assert (len(alone), len(crowd)) == (COUNT, COUNT)
    assert alone[:until] == crowd[:until] == reference[0].tokens[:until]


def through(engine: Engine) -> Iterator[Output]:
    """What it says until it has no work."""
    while engine.has_work:
        yield from engine.step()


def certain(greedy: Greedy) -> int:
    """How many tokens come before the reference's first near tie."""
    best = greedy.logits.topk(2).values
    ties = (best[:, 0] - best[:, 1] < NEAR_TIE).nonzero()
    until = int(ties[0]) if len(ties) else len(greedy.tokens)
    assert until >= 8, "a poor seed: the reference nearly ties at once"
    return until
