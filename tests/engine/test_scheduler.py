from __future__ import annotations

import pytest

from ringlm.engine.allocator import BlockAllocator
from ringlm.engine.messages import SequenceStep
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.engine.sampler import Chosen
from ringlm.engine.scheduler import Scheduler, Work
from ringlm.engine.sequence import Limits, Moment, begin
from ringlm.errors import RequestError

EOS = 99
LIMITS = Limits(context=100, vocabulary=100, eos_token_ids=frozenset({EOS}))


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = Moment(0.0, 0.0)

    def __call__(self) -> Moment:
        return self.now

    def tick(self, wall_s: float, ring_s: float) -> None:
        self.now = Moment(self.now.wall_s + wall_s, self.now.ring_s + ring_s)


def scheduler_of(max_seqs: int = 3, blocks: int = 3, token_budget: int = 8, clock: Clock | None = None) -> Scheduler:
    return Scheduler(
        max_seqs=max_seqs, allocator=BlockAllocator(blocks), token_budget=token_budget, clock=clock or Clock()
    )


def add(scheduler: Scheduler, id: int, length: int, **params: int) -> None:
    scheduler.add(begin(id, list(range(length)), SamplingParams(temperature=0.0, **params), LIMITS))


def next_work(scheduler: Scheduler) -> Work:
    work = scheduler.schedule()
    assert work is not None
    return work


def lengths(work: Work) -> list[tuple[int, int, int]]:
    """(id, start, length) of each part."""
    return [(part.id, part.start, len(part.tokens)) for part in work.message.sequences]


def turn(scheduler: Scheduler, token: int = 50) -> list[tuple[int, int, int]]:
    """One step in which everyone sampled gets `token`."""
    work = next_work(scheduler)
    scheduler.commit(work, [Chosen(token)] * len(work.sampled))
    return lengths(work)


def test_nothing_to_do() -> None:
    scheduler = scheduler_of()
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_a_prompt_goes_in_chunks_and_only_its_last_position_is_wanted() -> None:
    scheduler = scheduler_of(token_budget=4)
    add(scheduler, 7, 10)
    for start, tokens, wanted in ((0, [0, 1, 2, 3], []), (4, [4, 5, 6, 7], []), (8, [8, 9], [1])):
        work = next_work(scheduler)
        assert work.message.sequences == [SequenceStep(7, start, tokens, [0], wanted)]
        assert len(work.sampled) == len(wanted)
        (deltas := scheduler.commit(work, [Chosen(42)] * len(wanted)))
        assert [delta.tokens for delta in deltas] == [[42]] * len(wanted)
    assert next_work(scheduler).message.sequences == [SequenceStep(7, 10, [42], [0], [0])]


def test_decodes_first_then_prompts_in_order_of_arrival() -> None:
    scheduler = scheduler_of(token_budget=8)
    add(scheduler, 1, 20)
    add(scheduler, 2, 3)
    assert turn(scheduler) == [(1, 0, 8)]
    assert turn(scheduler) == [(1, 8, 8)]
    assert turn(scheduler) == [(1, 16, 4), (2, 0, 3)]
    add(scheduler, 3, 30)
    assert turn(scheduler) == [(1, 20, 1), (2, 3, 1), (3, 0, 6)]
    assert turn(scheduler) == [(1, 21, 1), (2, 4, 1), (3, 6, 6)]


def test_a_long_prompt_stops_no_decode() -> None:
    scheduler = scheduler_of(max_seqs=2, blocks=2, token_budget=2)
    add(scheduler, 1, 1, max_tokens=60)
    add(scheduler, 2, 40)
    for position in range(40):
        assert turn(scheduler) == [(1, position, 1), (2, position, 1)]


def test_decodes_leave_every_prompt_a_token() -> None:
    scheduler = scheduler_of(max_seqs=3, token_budget=3)
    for id, length in ((1, 1), (2, 1), (3, 9)):
        add(scheduler, id, length)
    turn(scheduler)
    assert turn(scheduler) == [(1, 1, 1), (2, 1, 1), (3, 1, 1)]


@pytest.mark.parametrize(("max_seqs", "blocks"), [(2, 5), (5, 2)])
def test_as_many_run_as_there_are_slots_and_blocks(max_seqs: int, blocks: int) -> None:
    scheduler = scheduler_of(max_seqs, blocks)
    for id in range(4):
        add(scheduler, id, 2, max_tokens=2)
    assert turn(scheduler) == [(0, 0, 2), (1, 0, 2)]
    assert turn(scheduler) == [(0, 2, 1), (1, 2, 1)]
    assert turn(scheduler) == [(2, 0, 2), (3, 0, 2)]  # in the blocks that were freed
    turn(scheduler)
    assert not scheduler.has_work
    assert scheduler.allocator.free_count == blocks


def test_nobody_is_admitted_without_a_token() -> None:
    scheduler = scheduler_of(token_budget=4)
    add(scheduler, 1, 4)
    add(scheduler, 2, 4)
    assert turn(scheduler) == [(1, 0, 4)]
    assert scheduler.allocator.free_count == 2


def test_messages_are_numbered_and_the_same_calls_give_the_same_messages() -> None:
    def messages() -> list[object]:
        scheduler = scheduler_of()
        made: list[object] = []
        for id in range(4):
            add(scheduler, id, 3 + id, max_tokens=3)
            work = next_work(scheduler)
            scheduler.commit(work, [Chosen(id)] * len(work.sampled))
            made.append(work.message)
        return [*made, scheduler.stop()]

    first = messages()
    assert [message.step for message in first] == [0, 1, 2, 3, 4]
    assert first == messages()


def test_ids_are_unique_while_they_live() -> None:
    scheduler = scheduler_of(max_seqs=1)
    add(scheduler, 1, 2, max_tokens=1)
    add(scheduler, 2, 2)
    for id in (1, 2):
        with pytest.raises(RequestError, match=f"Request {id} has not ended"):
            add(scheduler, id, 2)
    turn(scheduler)
    add(scheduler, 1, 2)


def test_cancel_anywhere_frees_the_block() -> None:
    scheduler = scheduler_of(max_seqs=2, blocks=2, token_budget=4)
    add(scheduler, 1, 2)
    add(scheduler, 2, 9)
    add(scheduler, 3, 2)
    turn(scheduler)  # 1 decodes, 2 is within its prompt, 3 waits
    for id, free in ((3, 0), (2, 1), (1, 2)):
        delta = scheduler.cancel(id)
        assert delta is not None
        assert (delta.id, delta.tokens, delta.finish_reason) == (id, [], StopReason.CANCELED)
        assert scheduler.allocator.free_count == free
        assert scheduler.cancel(id) is None
    assert scheduler.schedule() is None


def test_an_error_ends_one_request_and_not_the_others() -> None:
    scheduler = scheduler_of()
    add(scheduler, 1, 2)
    add(scheduler, 2, 2)
    first, second = scheduler.commit(next_work(scheduler), [RequestError("NaN"), Chosen(50)])
    assert (first.error, first.finish_reason, first.tokens) == ("NaN", None, [])
    assert (second.error, second.tokens) == (None, [50])
    assert turn(scheduler) == [(2, 2, 1)]


@pytest.mark.parametrize(
    ("params", "token", "reason"),
    [
        ({}, EOS, StopReason.STOP),
        ({"ignore_eos": True}, EOS, None),
        ({"stop_token_ids": (50,)}, 50, StopReason.STOP),
        ({"stop_token_ids": (50,), "ignore_eos": True}, 50, StopReason.STOP),
        ({"max_tokens": 1}, 50, StopReason.LENGTH),
        ({"max_tokens": 1}, EOS, StopReason.STOP),
        ({"max_tokens": 2}, 50, None),
    ],
    ids=str,
)
def test_why_a_sequence_ends(params: dict[str, int], token: int, reason: StopReason | None) -> None:
    """The token that ended it is among the tokens."""
    scheduler = scheduler_of()
    add(scheduler, 1, 2, **params)
    (delta,) = scheduler.commit(next_work(scheduler), [Chosen(token)])
    assert delta.tokens == [token]
    assert delta.finish_reason is reason
    assert scheduler.has_work == (reason is None)


def test_timings_are_of_the_phases_and_come_at_the_end() -> None:
    clock = Clock()
    scheduler = scheduler_of(max_seqs=1, token_budget=4, clock=clock)
    add(scheduler, 1, 1, max_tokens=1)
    add(scheduler, 2, 8, max_tokens=3)
    clock.tick(5.0, 0.0)
    turn(scheduler)  # waiting is in no one's time
    deltas = []
    for _ in range(4):
        work = next_work(scheduler)
        clock.tick(1.0, 0.25)
        deltas += scheduler.commit(work, [Chosen(50)] * len(work.sampled))
    assert [(d.prefill_s, d.decode_s, d.ring_s) for d in deltas] == [(0, 0, 0), (0, 0, 0), (2.0, 2.0, 1.0)]


def test_timings_of_a_canceled_request_are_those_of_the_phases_it_reached() -> None:
    clock = Clock()
    scheduler = scheduler_of(max_seqs=1, token_budget=4, clock=clock)
    add(scheduler, 1, 8)
    add(scheduler, 2, 8)
    turn(scheduler)
    clock.tick(3.0, 0.5)
    for id, timings in ((2, (0.0, 0.0, 0.0)), (1, (3.0, 0.0, 0.5))):
        delta = scheduler.cancel(id)
        assert delta is not None
        assert (delta.prefill_s, delta.decode_s, delta.ring_s) == timings


@pytest.mark.parametrize(("max_seqs", "token_budget"), [(0, 8), (9, 8)])
def test_budgets_that_could_starve_a_prompt_are_refused(max_seqs: int, token_budget: int) -> None:
    with pytest.raises(ValueError, match=f"max_seqs is {max_seqs}"):
        scheduler_of(max_seqs=max_seqs, token_budget=token_budget)
