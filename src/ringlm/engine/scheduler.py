"""Who advances in each step, and by how many tokens. Knows sequences and cache blocks; no tensors, no ranks.

Sequences that decode go first, with one token each; what the token budget leaves is spent on prompts, first
come first served, in chunks, so a long prompt never stops the others. The same calls give the same steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from ringlm.engine.allocator import BlockAllocator
from ringlm.engine.messages import SequenceStep, StepMessage, StopMessage
from ringlm.engine.request import StopReason
from ringlm.engine.sampler import Chosen, needed
from ringlm.engine.sequence import Clock, Delta, Moment, Sequence
from ringlm.errors import RequestError


@dataclass(frozen=True)
class Work:
    """One step: what every rank is told, and whom rank 0 advances by it."""

    message: StepMessage
    sequences: list[Sequence]  # of message.sequences, in order
    sampled: list[Sequence]  # those that get a token, in the order of their logits


class Scheduler:
    """The sequences that wait or run, and their cache blocks. Numbers the messages: `epoch`, and `step` from 0.

    At most `max_seqs` run at once, each on one block. `token_budget` bounds the tokens of a step; it is at
    least `max_seqs`, or decoding could starve a prompt. Between `schedule` and `commit` nothing else is called.
    """

    def __init__(
        self, *, max_seqs: int, allocator: BlockAllocator, token_budget: int, clock: Clock, epoch: int = 0
    ) -> None:
        if not 1 <= max_seqs <= token_budget:
            raise ValueError(f"max_seqs is {max_seqs}; it must be between 1 and token_budget, {token_budget}")
        self.max_seqs = max_seqs
        self.allocator = allocator
        self.token_budget = token_budget
        self.epoch = epoch
        self.step = 0
        self._clock = clock
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[int, Sequence] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    def add(self, sequence: Sequence) -> None:
        """Put `sequence` at the end of the queue; RequestError if one of its id has not ended."""
        if sequence.id in self._by_id:
            raise RequestError(f"Request {sequence.id} has not ended; give the new one another id.")
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, id: int) -> Delta | None:
        """End a sequence, wherever it is; None if there is none of that id."""
        sequence = self._by_id.get(id)
        if sequence is None:
            return None
        self._remove(sequence)
        return sequence.ended(self._clock(), [], StopReason.CANCELED)

    def schedule(self) -> Work | None:
        """The next step, or None when there is nothing to do."""
        parts: list[SequenceStep] = []
        sequences: list[Sequence] = []
        sampled: list[Sequence] = []
        budget = self.token_budget
        for sequence in self._in_turn():
            start, length = sequence.cached, min(sequence.pending, budget)
            last = length == sequence.pending
            tokens = sequence.tokens[start : start + length]
            wanted = [length - 1] if last else []
            parts.append(SequenceStep(sequence.id, start, tokens, sequence.blocks, wanted))
            sequences.append(sequence)
            if last:
                sampled.append(sequence)
            budget -= length
            if budget == 0:
                break
        if not parts:
            return None
        message = StepMessage(self.epoch, self.step, parts, *needed(sampled))
        self.step += 1
        return Work(message, sequences, sampled)

    def commit(self, work: Work, chosen: list[Chosen | RequestError]) -> list[Delta]:
        """Give each sampled sequence its token, or its error; the news of each, in the same order."""
        for sequence, part in zip(work.sequences, work.message.sequences, strict=True):
            sequence.cached += len(part.tokens)
        now = self._clock()
        return [self._advance(sequence, token, now) for sequence, token in zip(work.sampled, chosen, strict=True)]

    def stop(self) -> StopMessage:
        """The message after the last step."""
        return StopMessage(self.epoch, self.step)

    def _in_turn(self) -> Iterator[Sequence]:
        """Those that run, then those that can be admitted.

        Prompts come last by themselves: nobody is admitted before the budget has covered everyone ahead, so
        only the last to be admitted can be within its prompt.
        """
        yield from self._running
        while self._waiting and len(self._running) < self.max_seqs:
            block = self.allocator.allocate()
            if block is None:
                return
            sequence = self._waiting.popleft()
            sequence.blocks = [block]
            sequence.admitted = self._clock()
            self._running.append(sequence)
            yield sequence

    def _advance(self, sequence: Sequence, chosen: Chosen | RequestError, now: Moment) -> Delta:
        if isinstance(chosen, RequestError):
            self._remove(sequence)
            return sequence.ended(now, [], error=str(chosen))
        if sequence.first_token is None:
            sequence.first_token = now
        reason = sequence.append(chosen.token)
        logprobs = () if chosen.logprob is None else (chosen.logprob,)
        if reason is None:
            return Delta(sequence.id, [chosen.token], logprobs=logprobs)
        self._remove(sequence)
        return sequence.ended(now, [chosen.token], reason, logprobs=logprobs)

    def _remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.id]
        (self._running if sequence.blocks else self._waiting).remove(sequence)
        for block in sequence.blocks:
            self.allocator.free(block)
        sequence.blocks = []
