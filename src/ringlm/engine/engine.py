"""The engine of rank 0: requests in, tokens out, one step at a time; the other ranks follow. Knows token ids;
no text, no sockets, no frontends."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from ringlm.engine.allocator import BlockAllocator
from ringlm.engine.embedding import Vector, embed
from ringlm.engine.messages import Message, encode
from ringlm.engine.news import Figures, Output
from ringlm.engine.request import SamplingParams
from ringlm.engine.runner import Runner
from ringlm.engine.sampler import sample
from ringlm.engine.scheduler import Scheduler
from ringlm.engine.sequence import Limits, Moment, begin
from ringlm.parallel.communicator import Communicator

if TYPE_CHECKING:
    from ringlm.engine.grammar import Grammar, Masks

TOKEN_BUDGET = 512
MAX_WAITING = 256


class Engine:
    """Decides every step and runs rank 0's part of it. For one thread; calls come between steps.

    At most `max_seqs` sequences run at once and `max_waiting` wait for them to end; a step takes at most `token_budget`
    tokens, or one for each that runs. The runner's cache holds the model's context at least once.
    """

    def __init__(
        self,
        runner: Runner,
        comm: Communicator,
        *,
        max_seqs: int,
        max_waiting: int = MAX_WAITING,
        token_budget: int = TOKEN_BUDGET,
        epoch: int = 0,
    ) -> None:
        config = runner.model.config
        self._ring_s = 0.0  # within the collectives of earlier communicators
        self._forward_s = 0.0
        self._stopped = False
        self._masks: Masks | None = None  # made when somebody needs them
        self._link(runner, comm)
        self.limits = Limits(config.context, config.vocabulary, frozenset(config.eos_token_ids))
        self.scheduler = Scheduler(
            max_seqs=max_seqs,
            allocator=self._allocator(),
            token_budget=max(token_budget, max_seqs),
            clock=self._clock,
            max_waiting=max_waiting,
            epoch=epoch,
        )

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def figures(self) -> Figures:
        """How it does."""
        return self.scheduler.figures

    def submit(self, id: int, prompt_tokens: list[int], params: SamplingParams, grammar: Grammar | None = None) -> None:
        """Queue a request, whose answer follows `grammar`; RequestError if it cannot be computed or one of its id has
        not ended, QueueFullError if too many wait."""
        self.scheduler.add(begin(id, prompt_tokens, params, self.limits, grammar=grammar))

    def embed(self, id: int, tokens: list[int]) -> None:
        """Queue a request for the vector of `tokens`; RequestError as `submit`."""
        self.scheduler.add(begin(id, tokens, SamplingParams(), self.limits, embeds=True))

    def cancel(self, id: int) -> Output | None:
        """End a request and free its blocks. Its last news; None if it is unknown or has ended."""
        return self.scheduler.cancel(id)

    def step(self) -> list[Output | Vector]:
        """One turn: choose the work, run it on every rank, hand out the tokens and vectors."""
        work = self.scheduler.schedule()  # who advances, by how many tokens
        if work is None:
            return []
        self._tell(work.message)  # daemons wait in this same broadcast
        with self._masking([each.grammar for each in work.sampled if each.grammar is not None]):
            begun = time.perf_counter()
            logits, states = self.runner.run(work.message, work.rows)
            self._forward_s += time.perf_counter() - begun
        return self.scheduler.commit(work, sample(logits, work.sampled), embed(states, work.embedded))

    def pause(self) -> None:
        """The runner and its communicator are gone: nothing steps until `resume`. Requests keep what they have, and may
        be submitted and canceled meanwhile."""
        self.scheduler.pause()
        del self.runner  # the next one needs the memory of its cache

    def resume(self, runner: Runner, comm: Communicator, *, epoch: int) -> None:
        """Go on, in another `epoch`, with a runner of the same model whose cache is empty: every request computes its
        prompt and its tokens so far again, and gets the same ones as it would have without a pause."""
        self._ring_s += self.comm.seconds
        self._link(runner, comm)
        self.scheduler.resume(self._allocator(), epoch)

    def stop(self, *, again: bool = False) -> None:
        """Tell the other ranks that there are no more steps, or none until this engine has been paused and resumed. A
        second call does nothing."""
        if not self._stopped:
            self._stopped = not again
            if self._masks is not None and self._stopped:
                self._masks.close()
            self._tell(self.scheduler.stop(again))

    def _masking(self, grammars: list[Grammar]) -> contextlib.AbstractContextManager[None]:
        """What is to come next is worked out in the block."""
        if not grammars:
            return contextlib.nullcontext()
        if self._masks is None:
            from ringlm.engine.grammar import Masks

            self._masks = Masks()
        return self._masks.made(grammars)

    def _link(self, runner: Runner, comm: Communicator) -> None:
        assert runner.cache.positions >= runner.model.config.context, "a sequence that runs alone could not grow"
        self.runner, self.comm = runner, comm

    def _allocator(self) -> BlockAllocator:
        return BlockAllocator(self.runner.cache.blocks, self.runner.cache.block)

    def _tell(self, message: Message) -> None:
        if self.comm.world_size > 1:
            self.comm.broadcast_bytes(encode(message))

    def _clock(self) -> Moment:
        return Moment(time.perf_counter(), self._ring_s + self.comm.seconds, self._forward_s)
