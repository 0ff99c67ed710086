"""Who advances in each step, and by how many tokens. Knows sequences and cache blocks; no tensors, no ranks.

Sequences that decode go first, with one token each; what the token budget leaves is spent on prompts, first
come first served, in chunks, and while others decode in chunks that delay them little (pace.py). A sequence begins once
there are blocks for all its tokens, and grows by one; where none is left, the last to be admitted gives up its own and
begins again later, from the front of the queue. The same calls at the same times give the same steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ringlm.engine.allocator import BlockAllocator, Prefix
from ringlm.engine.embedding import Vector
from ringlm.engine.messages import SequenceStep, StepMessage, StopMessage
from ringlm.engine.news import Figures, Output
from ringlm.engine.pace import Pace
from ringlm.engine.request import StopReason
from ringlm.engine.sampler import Chosen, needed
from ringlm.engine.sequence import Clock, Moment, Sequence
from ringlm.errors import QueueFullError, RequestError


@dataclass(frozen=True)
class Work:
    """One step: what every rank is told, and whom rank 0 advances by it."""

    message: StepMessage
    sequences: list[Sequence]  # of message.sequences, in order
    sampled: list[Sequence]  # those that get a token, in the order of their logits
    embedded: list[Sequence]  # those that get their vector
    rows: list[int]  # of all tokens laid end to end, the last of each of `embedded`
    begun: Moment


class Scheduler:
    """The sequences that wait or run, and their cache blocks. Numbers the messages: `epoch`, and `step` from 0.

    At most `max_seqs` run at once, and `max_waiting` may wait for them to end. `token_budget` bounds the tokens of a
    step; it is at least `max_seqs`, or decoding could starve a prompt. The allocator has blocks for any one sequence.
    Between `schedule` and `commit` nothing else is called.
    """

    def __init__(
        self,
        *,
        max_seqs: int,
        allocator: BlockAllocator,
        token_budget: int,
        clock: Clock,
        max_waiting: int,
        epoch: int = 0,
    ) -> None:
        if not 1 <= max_seqs <= token_budget:
            raise ValueError(f"max_seqs is {max_seqs}; it must be between 1 and token_budget, {token_budget}")
        self.max_seqs = max_seqs
        self.allocator = allocator
        self.token_budget = token_budget
        self.max_waiting = max_waiting
        self.epoch = epoch
        self.step = 0
        self._steps = 0  # of earlier epochs
        self._clock = clock
        self._pace = Pace()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []  # in order of admission
        self._by_id: dict[int, Sequence] = {}
        self._prompt_tokens = self._cached_tokens = self._generated_tokens = self._preemptions = 0
        self._step_s = self._ring_s = self._forward_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._by_id)

    @property
    def figures(self) -> Figures:
        free, idle = self.allocator.free_count, self.allocator.idle_count
        return Figures(
            running=len(self._running),
            waiting=len(self._waiting),
            blocks=self.allocator.count,
            blocks_in_use=self.allocator.count - free,
            blocks_cached=idle,
            steps=self._steps + self.step,
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            generated_tokens=self._generated_tokens,
            preemptions=self._preemptions,
            step_s=self._step_s,
            ring_s=self._ring_s,
            forward_s=self._forward_s,
        )

    def add(self, sequence: Sequence) -> None:
        """Put `sequence` at the end of the queue; RequestError if one of its id has not ended, QueueFullError if too
        many wait."""
        if sequence.id in self._by_id:
            raise RequestError(f"Request {sequence.id} has not ended; give the new one another id.")
        if len(self._by_id) >= self.max_seqs + self.max_waiting:
            raise QueueFullError(f"{len(self._waiting)} requests wait already, as many as may; try again later.")
        sequence.submitted = self._clock()
        self._by_id[sequence.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, id: int) -> Output | None:
        """End a sequence, wherever it is; None if there is none of that id."""
        sequence = self._by_id.get(id)
        if sequence is None:
            return None
        self._remove(sequence)
        return sequence.ended(self._clock(), [], StopReason.CANCELED)

    def schedule(self) -> Work | None:
        """The next step, or None when there is nothing to do."""
        begun = self._clock()
        parts: list[SequenceStep] = []
        sequences: list[Sequence] = []
        sampled: list[Sequence] = []
        embedded: list[Sequence] = []
        rows: list[int] = []
        end = 0
        for sequence, length in self._in_turn():
            start = sequence.cached
            last = length == sequence.pending
            tokens = sequence.tokens[start : start + length]
            wanted = [length - 1] if last and not sequence.embeds else []
            parts.append(SequenceStep(sequence.id, start, tokens, sequence.blocks, wanted))
            sequences.append(sequence)
            end += length
            if wanted:
                sampled.append(sequence)
            elif last:
                embedded.append(sequence)
                rows.append(end - 1)
        if not parts:
            return None
        message = StepMessage(self.epoch, self.step, parts, *needed(sampled))
        self.step += 1
        return Work(message, sequences, sampled, embedded, rows, begun)

    def commit(
        self, work: Work, chosen: list[Chosen | RequestError], vectors: Iterable[Vector | RequestError] = ()
    ) -> list[Output | Vector]:
        """Give each sampled sequence its token, each embedded one its vector, or either its error; the news of all, in
        this order."""
        now = self._clock()
        self._step_s += now.wall_s - work.begun.wall_s
        self._ring_s += now.ring_s - work.begun.ring_s
        self._forward_s += now.forward_s - work.begun.forward_s
        lengths = [len(part.tokens) for part in work.message.sequences]
        if 1 in lengths:
            self._pace.observe(now.wall_s - work.begun.wall_s, sum(length for length in lengths if length > 1))
        for sequence, length in zip(work.sequences, lengths, strict=True):
            sequence.cached += length
            self._learn(sequence)
        news: list[Output | Vector] = [self._advance(*each, now) for each in zip(work.sampled, chosen, strict=True)]
        for sequence, vector in zip(work.embedded, vectors, strict=True):
            self._remove(sequence)
            news.append(sequence.ended(now, [], error=str(vector)) if isinstance(vector, RequestError) else vector)
        return news

    def pause(self) -> None:
        """The cache is lost: all that run begin again from their tokens so far, in order and before those that wait."""
        for sequence in reversed(self._running):
            sequence.blocks = []
            self._waiting.appendleft(sequence)
        self._running.clear()

    def resume(self, allocator: BlockAllocator, epoch: int) -> None:
        """Go on after `pause` with an empty cache, in another epoch."""
        self.allocator = allocator
        self._steps += self.step
        self.epoch, self.step = epoch, 0
        self._pace = Pace()

    def stop(self, again: bool) -> StopMessage:
        """The message after the last step of this epoch, or of all."""
        return StopMessage(self.epoch, self.step, again)

    def _in_turn(self) -> Iterator[tuple[Sequence, int]]:
        """Those that advance, and by how many tokens: those that decode, then prompts, then those that can be admitted.

        While others decode, prompts share the pace's tokens; without them, the whole budget.
        """
        budget, paced = self.token_budget, self._pace.prompt_tokens()
        for sequence in [one for one in self._running if one.pending == 1]:
            if sequence.blocks and self._grow(sequence):  # it may have been put back for one before it
                budget -= 1
                yield sequence, 1
        if budget < self.token_budget:
            budget = min(budget, paced)
        for sequence in [one for one in self._running if one.pending > 1]:
            if budget:
                length = min(sequence.pending, budget)
                budget -= length
                yield sequence, length
        skipped = 0
        while budget and len(self._running) + skipped < self.max_seqs and skipped < len(self._waiting):
            sequence = self._waiting[skipped]
            prefix = self.allocator.longest_known(sequence.tokens)
            if self._more_comes(sequence, prefix):
                skipped += 1
                continue
            if not self._admit(sequence, prefix):
                return
            del self._waiting[skipped]
            length = min(sequence.pending, budget)
            budget -= length
            yield sequence, length

    def _more_comes(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether another is just computing what follows `prefix` in `sequence`, so that it had better wait for it."""
        end = (len(prefix.blocks) + 1) * self.allocator.size
        if end >= len(sequence.tokens):
            return False
        start = sequence.tokens[:end]
        return any(
            other.pending > 1 and other.cached < end <= len(other.tokens) and other.tokens[:end] == start
            for other in self._running
        )

    def _admit(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Let `sequence` run on blocks for all its tokens, those of `prefix` included; False if there are too few."""
        self.allocator.hold(prefix.blocks)
        missing = -(-len(sequence.tokens) // self.allocator.size) - len(prefix.blocks)
        more = self.allocator.allocate(missing, after=prefix.blocks[-1] if prefix.blocks else None)
        if more is None:
            self.allocator.free(prefix.blocks)
            return False
        sequence.blocks = prefix.blocks + more
        sequence.known, sequence.prefix = len(prefix.blocks), prefix.number
        sequence.cached = sequence.known * self.allocator.size
        if sequence.admitted is None:
            sequence.admitted = self._clock()
            sequence.found = sequence.cached
            self._prompt_tokens += len(sequence.tokens)
            self._cached_tokens += sequence.found
        self._running.append(sequence)
        return True

    def _grow(self, sequence: Sequence) -> bool:
        """See that there is a block for the next position; False if `sequence` itself had to be put back."""
        while sequence.cached == len(sequence.blocks) * self.allocator.size:
            more = self.allocator.allocate(1, after=sequence.blocks[-1])
            if more is not None:
                sequence.blocks = sequence.blocks + more
                break
            last = self._running.pop()
            self._release(last)
            self._waiting.appendleft(last)
            self._preemptions += 1
            if last is sequence:
                return False
        return True

    def _learn(self, sequence: Sequence) -> None:
        """Make known what `sequence` has filled."""
        size = self.allocator.size
        while (end := (sequence.known + 1) * size) <= sequence.cached:
            tokens, block = sequence.tokens[end - size : end], sequence.blocks[sequence.known]
            sequence.prefix = self.allocator.learn(sequence.prefix, tokens, block)
            sequence.known += 1

    def _advance(self, sequence: Sequence, chosen: Chosen | RequestError, now: Moment) -> Output:
        if isinstance(chosen, RequestError):
            self._remove(sequence)
            return sequence.ended(now, [], error=str(chosen))
        if sequence.first_token is None:
            sequence.first_token = now
        self._generated_tokens += 1
        reason = sequence.append(chosen.token)
        logprobs = () if chosen.logprob is None else (chosen.logprob,)
        if reason is None:
            waited, found = sequence.queue_s, sequence.found
            return Output(sequence.id, [chosen.token], logprobs=logprobs, queue_s=waited, cached_tokens=found)
        self._remove(sequence)
        return sequence.ended(now, [chosen.token], reason, logprobs=logprobs)

    def _remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.id]
        if sequence.blocks:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)

    def _release(self, sequence: Sequence) -> None:
        self.allocator.free(sequence.blocks)
        sequence.blocks = []
