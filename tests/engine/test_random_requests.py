"""Requests come and go at random moments: ranks stay in step, blocks come back, and nobody's tokens change."""

from __future__ import annotations

from functools import cache
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ringlm.engine.request import SamplingParams, StopReason
from ringlm.engine.sequence import Delta
from tests.engine.fake import CONTEXT, World, alone, free_blocks, tokens_of

BLOCKS = 3
SAMPLED = {"temperature": 1.5}
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {**SAMPLED, "top_k": 4},
    {**SAMPLED, "top_k": 9, "top_p": 0.8},
    {**SAMPLED},
    {**SAMPLED, "top_p": 0.7, "min_p": 0.05},
    {"temperature": 0.0, "min_tokens": 1, "bad_token_ids": ((4,), (5, 6)), "logprobs": 2},
    {**SAMPLED, "repetition_penalty": 1.5, "frequency_penalty": 0.5, "logit_bias": {3: 2.0}},
]
prompts = st.lists(st.integers(0, 22), min_size=1, max_size=CONTEXT).map(tuple)
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

    @initialize(world_size=st.integers(1, 3), token_budget=st.integers(BLOCKS, 20))
    def start(self, world_size: int, token_budget: int) -> None:
        self.world = World(world_size, blocks=BLOCKS, token_budget=token_budget)
        self.asked: dict[int, tuple[tuple[int, ...], SamplingParams]] = {}
        self.news: dict[int, list[Delta]] = {}

    @rule(prompt=prompts, params=params_of)
    def submit(self, prompt: tuple[int, ...], params: SamplingParams) -> None:
        id = len(self.asked)
        self.world.engine.submit(id, list(prompt), params)
        self.asked[id] = (prompt, params)
        self.news[id] = []

    @rule(count=st.integers(1, 4))
    def step(self, count: int) -> None:
        for _ in range(count):
            for delta in self.world.engine.step():
                self.take(delta)

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
        assert BLOCKS - min(going_on, BLOCKS) <= free_blocks(self.world.engine) <= BLOCKS
        assert self.world.engine.has_work == (going_on > 0)

    def take(self, delta: Delta) -> None:
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
            assert free_blocks(self.world.engine) == BLOCKS
        for id, (prompt, params) in self.asked.items():
            tokens, reason = told_alone(prompt, msgspec.msgpack.encode(params))
            told, end = tokens_of(self.news[id]), self.news[id][-1].finish_reason
            if end is StopReason.CANCELED:
                assert told == tokens[: len(told)]
            else:
                assert (told, end) == (tokens, reason)


TestRequests = Requests.TestCase
TestRequests.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
