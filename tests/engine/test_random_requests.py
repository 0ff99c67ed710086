"""Requests come and go at random moments, many with the same beginnings, on as few blocks as there may be: ranks stay
in step, blocks come back, and nobody's tokens change."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ringlm.engine.news import Output
from ringlm.engine.request import SamplingParams, StopReason, StructuredOutputsParams
from ringlm.errors import QueueFullError
from tests.engine.fake import CONTEXT, SEQUENCE, World, alone, grammar_of, tokens_of

MAX_SEQS, MAX_WAITING = 3, 4
SAMPLED = {"temperature": 1.5}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {**SAMPLED, "top_k": 4},
    {**SAMPLED, "top_k": 9, "top_p": 0.8},
    {**SAMPLED},
    {**SAMPLED, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 0.0, "min_tokens": 1, "bad_token_ids": ((4,), (5, 6)), "logprobs": 2},
    {**SAMPLED, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
    {
        **SAMPLED,
        "structured_outputs": StructuredOutputsParams(grammar="start: (/[d-g]+/ | /h[i-m]{2}/)*"),
        "min_tokens": 1,
    },
    {"temperature": 0.0, "structured_outputs": StructuredOutputsParams(grammar="start: /[a-w]{1,5}x?/"), "logprobs": 1},
]
# The second stem begins as the first does.
STEMS = [(), (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11), (1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0), (7,) * 9]
prompts = st.tuples(st.sampled_from(STEMS), st.lists(st.integers(0, 22), max_size=11)).map(
    lambda parts: (*parts[0], *parts[1])[:CONTEXT] or (3,)
)
params_of = st.builds(
    lambda kind, seed, max_tokens, ignore_eos: SamplingParams(
        **kind, seed=seed, max_tokens=max_tokens, ignore_eos=ignore_eos
    ),
    st.sampled_from(KINDS),
    st.integers(0, 3),
    st.integers(1, 12),
    st.booleans(),
)


@cache
def told_alone(prompt: tuple[int, ...], params: bytes) -> tuple[list[int], StopReason | None]:
    return alone(list(prompt), msgspec.msgpack.decode(params, type=SamplingParams))


class Requests(RuleBasedStateMachine):
    """A world of one to three ranks and what its requests have been told."""

    world: World

    @initialize(
        world_size=st.integers(1, 3),
        token_budget=st.integers(MAX_SEQS, 20),
        blocks=st.integers(SEQUENCE, MAX_SEQS * SEQUENCE),
    )
    def start(self, world_size: int, token_budget: int, blocks: int) -> None:
        self.world = World(
            world_size, max_seqs=MAX_SEQS, blocks=blocks, max_waiting=MAX_WAITING, token_budget=token_budget
        )
        self.asked: dict[int, tuple[tuple[int, ...], SamplingParams]] = {}
        self.news: dict[int, list[Output]] = {}

    @rule(prompt=prompts, params=params_of)
    def submit(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        id = len(self.asked)
        if sum(not self.ended(id) for id in self.asked) == MAX_SEQS + MAX_WAITING:
            with pytest.raises(QueueFullError):
                self.world.engine.submit(id, list(prompt), params)
            return
        self.world.engine.submit(id, list(prompt), params, grammar_of(params))
        self.asked[id] = (prompt, params)
        self.news[id] = []

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.world.engine.step():
                self.take(delta)

    @rule(back=st.integers(1, 3), count=st.integers(1, 8))
    def go_on(self, back: int, count: int) -> None:
        """A prompt that is another request's, and what it has been told so far: the next turn of a chat."""
        id = len(self.asked) - back
        if id in self.asked:
            prompt, params = self.asked[id]
            self.submit((*prompt, *tokens_of(self.news[id]), 5)[:CONTEXT], params.replace(max_tokens=count))

    @rule(back=st.integers(0, 6))
    def cancel(self, back: int) -> None:
        """A late request, or one that has ended, or one that never was."""
        id = len(self.asked) - back
        going_on = id in self.news and not self.ended(id)
        delta = self.world.engine.cancel(id)
        assert (delta is not None) == going_on
        if delta is not None:
            assert delta.finish_reason is StopReason.CANCELED
            self.take(delta)

    @invariant()
    def blocks_add_up(self) -> None:
        going_on = sum(not self.ended(id) for id in self.asked)
        figures = self.world.engine.figures
        assert figures.running + figures.waiting == going_on
        assert 0 <= figures.blocks_in_use <= figures.blocks - figures.blocks_cached
        assert figures.running or not figures.blocks_in_use
        assert self.world.engine.has_work == (going_on > 0)

    def take(self, delta: Output) -> None:
        assert not self.ended(delta.id)
        assert delta.error is None
        self.news[delta.id].append(delta)

    def ended(self, id: int) -> bool:
        return bool(self.news[id]) and self.news[id][-1].finish_reason is not None

    def teardown(self) -> None:
        if not hasattr(self, "world"):
            return
        with self.world:
            for deltas in self.world.run().values():
                for delta in deltas:
                    self.take(delta)
            figures = self.world.engine.figures
            assert (figures.running, figures.waiting, figures.blocks_in_use) == (0, 0, 0)
            assert figures.generated_tokens == sum(len(tokens_of(news)) for news in self.news.values())
        for id, (prompt, params) in self.asked.items():
            tokens, reason = told_alone(prompt, msgspec.msgpack.encode(params))
            told, end = tokens_of(self.news[id]), self.news[id][-1].finish_reason
            if end is StopReason.CANCELED:
                assert told == tokens[: len(told)]
            else:
                assert (told, end) == (tokens, reason)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
