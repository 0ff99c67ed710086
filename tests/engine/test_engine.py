from __future__ import annotations

import numpy as np
import pytest

from ringlm.engine.messages import StepMessage, decode, encode
from ringlm.engine.news import Output
from ringlm.engine.request import SamplingParams, StopReason, StructuredOutputsParams
from ringlm.engine.runner import Runner
from ringlm.errors import RequestError
from tests.engine.fake import (
    CONTEXT,
    EOS,
    VOCABULARY,
    FakeCache,
    World,
    alone,
    blocks_in_use,
    grammar_of,
    logits_after,
    tokens_of,
)

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
SETTINGS = [
    GREEDY,
    GREEDY.replace(temperature=1.0, seed=3),
    GREEDY.replace(temperature=2.0, seed=4, top_k=5),
    GREEDY.replace(temperature=1.5, seed=5, top_p=0.8),
    GREEDY.replace(temperature=0.7, seed=6, min_p=0.1, top_k=70),
    GREEDY.replace(min_tokens=3, ignore_eos=False, bad_token_ids=[[5], [3, 8]], logprobs=3),
    GREEDY.replace(repetition_penalty=1.4, frequency_penalty=0.5, logit_bias={4: 2.0, 9: -1.5}, logprobs=0),
    GREEDY.replace(temperature=1.3, seed=7, typical_p=0.8, presence_penalty=1.0),
    GREEDY.replace(temperature=1.3, seed=8, structured_outputs=StructuredOutputsParams(grammar="start: /([d-g]h?)*/")),
]


def greedy(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(logits_after(tokens).argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("token_budget", [3, 4, 7, 64])
def test_greedy_tokens_are_the_models_at_any_world_size_and_chunk(world_size: int, token_budget: int) -> None:
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [9] * 12, [8, 7]]
    with World(world_size, token_budget=token_budget) as world:
        for id, prompt in enumerate(prompts):
            world.engine.submit(id, prompt, GREEDY)
        news = world.run()
        assert blocks_in_use(world.engine) == 0
    for id, prompt in enumerate(prompts):
        assert tokens_of(news[id]) == greedy(prompt, 6)
        assert news[id][-1].finish_reason is StopReason.LENGTH


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_mixed_settings_in_one_batch_give_what_each_gives_alone(world_size: int) -> None:
    with World(world_size, max_seqs=5) as world:
        for id, params in enumerate(SETTINGS):
            world.engine.submit(id, [3, 1, 4, 1, 5], params, grammar_of(params))
        news = world.run()
    for id, params in enumerate(SETTINGS):
        assert tokens_of(news[id]) == alone([3, 1, 4, 1, 5], params)[0]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_logprobs_come_with_their_tokens(world_size: int) -> None:
    prompt = [3, 1, 4]
    with World(world_size) as world:
        world.engine.submit(0, prompt, GREEDY.replace(logprobs=2))
        world.engine.submit(1, prompt, GREEDY)
        news = world.run()
    tokens = tokens_of(news[0])
    logprobs = [found for delta in news[0] for found in delta.logprobs]
    assert [found.token for found in logprobs] == tokens == tokens_of(news[1])
    for index, found in enumerate(logprobs):
        logits = logits_after(prompt + tokens[:index]).astype(np.float64)
        reference = logits - np.log(np.exp(logits).sum())
        top = sorted(range(VOCABULARY), key=lambda token: (-logits[token], token))[:2]
        assert [token for token, _ in found.top] == top
        assert found.logprob == pytest.approx(reference[found.token], abs=1e-5)
        assert [value for _, value in found.top] == pytest.approx(reference[top].tolist(), abs=1e-5)
    assert not any(delta.logprobs for delta in news[1])


@pytest.mark.parametrize(
    ("params", "collective"),
    [
        (SETTINGS[0], "gather_bytes"),
        (SETTINGS[2], "gather_bytes"),
        (SETTINGS[3], "gather"),
        (SETTINGS[5], "gather_bytes"),
        (SETTINGS[6], "gather"),
    ],
)
def test_what_a_step_sends(params: SamplingParams, collective: str) -> None:
    """One broadcast a step; one gather, of candidates where they suffice, and none before the prompt's end."""
    with World(2, token_budget=4) as world:
        calls = world.group.ranks[0].calls
        world.engine.submit(0, list(range(9)), params)
        for gathers, tokens in ((0, 4), (0, 4), (1, 1), (2, 1)):
            world.engine.step()
            assert calls.get(collective, 0) == gathers
            assert world.models[1].batches[-1].tokens.numel() == tokens
        assert calls["broadcast_bytes"] == 4
        assert set(calls) == {"broadcast_bytes", "all_reduce", collective}


def test_a_world_of_one_sends_nothing() -> None:
    with World(1) as world:
        world.engine.submit(0, [1, 2], GREEDY)
        world.run()
        assert set(world.group.ranks[0].calls) == {"all_reduce"}  # the model's own


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt is empty"),
        ([1] * (CONTEXT + 1), f"has {CONTEXT + 1} tokens and the context holds {CONTEXT}"),
        ([1, VOCABULARY, 2], f"token 1 is {VOCABULARY}; token ids of this model are 0 to {VOCABULARY - 1}"),
        ([1, 2, -3], "token 2 is -3"),
    ],
)
def test_prompts_that_are_refused(prompt: list[int], message: str) -> None:
    with World(1) as world:
        with pytest.raises(RequestError, match=message):
            world.engine.submit(0, prompt, GREEDY)
        assert not world.engine.has_work


@pytest.mark.parametrize("length", [CONTEXT - 3, CONTEXT - 1, CONTEXT])
def test_a_full_context_ends_with_length(length: int) -> None:
    """The last token needs no place of its own, so even a prompt that fills the context gets one."""
    prompt = [1 + i % 5 for i in range(length)]
    tokens, reason = alone(prompt, GREEDY.replace(max_tokens=100))
    assert tokens == greedy(prompt, CONTEXT - length + 1)
    assert reason is StopReason.LENGTH


def test_the_end_of_sequence_token_is_returned() -> None:
    prompt = next([i] for i in range(3, VOCABULARY) if EOS in greedy([i], 15))
    tokens, reason = alone(prompt, GREEDY.replace(ignore_eos=False, max_tokens=15))
    assert tokens[-1] == EOS
    assert EOS not in tokens[:-1]
    assert reason is StopReason.STOP
    assert len(alone(prompt, GREEDY.replace(max_tokens=15))[0]) == 15


def test_blocks_are_used_again_after_a_cancel() -> None:
    """What a cancelled request left in its block is not seen by the next one."""
    with World(2, max_seqs=1, token_budget=4) as world:
        world.engine.submit(0, [4] * 11, GREEDY)
        world.engine.submit(1, [6, 7], GREEDY)
        world.engine.step()
        delta = world.engine.cancel(0)
        assert delta is not None
        assert delta.finish_reason is StopReason.CANCELED
        assert world.engine.cancel(17) is None
        assert tokens_of(world.run()[1]) == greedy([6, 7], 6)
        assert world.engine.step() == []


def test_logits_that_are_not_finite_end_their_request_alone() -> None:
    poison = 22
    with World(2, poison=poison) as world:
        world.engine.submit(0, [1, poison], GREEDY)
        world.engine.submit(1, [1, 2], GREEDY.replace(stop_token_ids=(poison,)))
        news = world.run()
        assert blocks_in_use(world.engine) == 0
    (bad,) = news[0]
    assert bad.error is not None
    assert "token 2 of request 0 is nan" in bad.error
    assert bad.finish_reason is None
    assert news[1][-1].finish_reason is not None


def test_timings_and_time_within_collectives() -> None:
    with World(1) as world:
        comm = world.group.ranks[0]
        comm.seconds = 10.0
        world.engine.submit(0, [1, 2, 3], GREEDY)
        world.engine.step()
        comm.seconds = 10.5
        last = world.run()[0][-1]
    assert last.ring_s == 0.5
    assert last.prefill_s > 0.0
    assert last.decode_s > 0.0


def test_stop_is_said_once() -> None:
    with World(2) as world:
        world.engine.submit(0, [1], GREEDY)
        world.engine.step()
        world.engine.stop()
        world.engine.stop()
        assert world.group.ranks[0].calls["broadcast_bytes"] == 2


def test_the_message_is_all_that_daemons_get() -> None:
    """No text, no sampling parameters: token ids, positions, blocks."""
    sent: list[bytes] = []
    with World(2) as world:
        comm = world.group.ranks[0]
        broadcast = comm.broadcast_bytes
        comm.broadcast_bytes = lambda data, root=0: sent.append(data) or broadcast(data, root)
        world.engine.submit(7, [1, 2, 3], GREEDY.replace(max_tokens=2))
        world.run()
    first = decode(sent[0])
    assert isinstance(first, StepMessage)
    (part,) = first.sequences
    assert (first.epoch, first.step, first.candidates) == (0, 0, 1)
    assert (part.id, part.start, part.tokens, part.blocks, part.wanted) == (7, 0, [1, 2, 3], [0], [2])
    assert len(sent[0]) < 30


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 9])
def test_an_engine_that_is_paused_goes_on_with_the_same_tokens(steps: int) -> None:
    """What a request has is kept, and nothing of it is told twice; the cache it goes on with is an empty one."""
    prompt = [3, 1, 4, 1, 5]
    with World(1, max_seqs=5) as world:
        engine = world.engine
        for id, params in enumerate(SETTINGS):
            engine.submit(id, prompt, params, grammar_of(params))
        news: dict[int, list[Output]] = {id: [] for id in range(len(SETTINGS))}
        for _ in range(steps):
            for delta in engine.step():
                news[delta.id].append(delta)
        done, last_runner = engine.figures.steps, engine.runner
        engine.pause()
        assert (engine.figures.running, engine.figures.waiting) == (0, len(SETTINGS) - ended(news))
        engine.submit(99, prompt, GREEDY)
        last = engine.cancel(99)
        assert last is not None
        assert last.finish_reason is StopReason.CANCELED
        runner = Runner(last_runner.model, FakeCache(last_runner.cache.blocks), engine.comm)
        engine.resume(runner, engine.comm, epoch=5)
        assert decode(encode(engine.scheduler.stop(again=False))).epoch == 5
        for id, deltas in world.run().items():
            news[id] += deltas
        assert engine.figures.steps > done
        assert blocks_in_use(engine) == 0
    for id, params in enumerate(SETTINGS):
        assert tokens_of(news[id]) == alone(prompt, params)[0]


def ended(news: dict[int, list[Output]]) -> int:
    return sum(bool(deltas) and deltas[-1].finish_reason is not None for deltas in news.values())
