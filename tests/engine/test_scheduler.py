from __future__ import annotations

import pytest

from ringlm.engine.allocator import BlockAllocator
from ringlm.engine.messages import SequenceStep
from ringlm.engine.request import SamplingParams, StopReason
from ringlm.engine.sampler import Chosen
from ringlm.engine.scheduler import Scheduler, Work
from ringlm.engine.sequence import Limits, Moment, begin
from ringlm.errors import QueueFullError, RequestError

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


def scheduler_of(
    max_seqs: int = 3,
    blocks: int = 3,
    token_budget: int = 8,
    clock: Clock | None = None,
    size: int = 100,
    max_waiting: int = 9,
) -> Scheduler:
    """With `size` as it is a block holds any sequence."""
    return Scheduler(
        max_seqs=max_seqs,
        allocator=BlockAllocator(blocks, size),
        token_budget=token_budget,
        clock=clock or Clock(),
        max_waiting=max_waiting,
    )


def add(scheduler: Scheduler, id: int, length: int, first: int = 0, **params: int) -> None:
    """A prompt of the tokens from `first` on."""
    prompt = list(range(first, first + length))
    scheduler.add(begin(id, prompt, SamplingParams(temperature=0.0, **params), LIMITS))


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
        return [*made, scheduler.stop(again=False)]

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
    assert [d.queue_s for d in deltas] == [5.0] * 3
    assert (scheduler.figures.step_s, scheduler.figures.ring_s) == (4.0, 1.0)


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


def paged(blocks: int = 8, **changes: int) -> Scheduler:
    """Blocks of four positions."""
    return scheduler_of(**({"blocks": blocks, "size": 4, "token_budget": 64} | changes))


def blocks_of(work: Work) -> dict[int, list[int]]:
    return {part.id: list(part.blocks) for part in work.message.sequences}


def test_a_sequence_grows_by_a_block_where_the_last_one_is_full() -> None:
    scheduler = paged()
    add(scheduler, 1, 3, max_tokens=9)
    grown = []
    while scheduler.has_work:
        work = next_work(scheduler)
        grown.append(blocks_of(work)[1])
        scheduler.commit(work, [Chosen(50)])
    assert grown == [[0], [0], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert scheduler.figures.blocks_in_use == 0
    assert scheduler.figures.blocks_cached == 2  # the third is not full


def test_what_is_known_is_not_computed_again() -> None:
    """Of a prompt, of an answer, and only what is computed already."""
    scheduler = paged()
    add(scheduler, 1, 6, max_tokens=4)
    turn(scheduler, 6)
    add(scheduler, 2, 6)
    assert turn(scheduler, 7) == [(1, 6, 1), (2, 4, 2)]
    for token in (8, 9):
        turn(scheduler, token)
    add(scheduler, 3, 12)  # the first one's prompt, its answer, and more
    work = next_work(scheduler)
    assert lengths(work)[-1] == (3, 8, 4)
    (*_, delta) = scheduler.commit(work, [Chosen(50)] * 2)
    assert (delta.id, delta.cached_tokens) == (3, 8)
    assert (scheduler.figures.prompt_tokens, scheduler.figures.cached_tokens) == (24, 12)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    scheduler = paged()
    for id in (1, 2):
        add(scheduler, id, 8, max_tokens=1)
        turn(scheduler)
    add(scheduler, 3, 8)
    assert turn(scheduler) == [(3, 4, 4)]


@pytest.mark.parametrize("dies", [False, True])
def test_a_prompt_that_another_is_computing_waits_for_it(dies: bool) -> None:
    scheduler = paged(token_budget=8)
    add(scheduler, 1, 19)
    add(scheduler, 2, 18)
    add(scheduler, 3, 3, first=60)
    assert turn(scheduler) == [(1, 0, 8)]
    assert turn(scheduler) == [(1, 8, 8)]
    if dies:
        scheduler.cancel(1)
        assert turn(scheduler) == [(2, 16, 2), (3, 0, 3)]
    else:
        assert turn(scheduler) == [(1, 16, 3), (2, 16, 2), (3, 0, 3)]


def test_who_waits_for_a_shared_part_does_not_stop_the_others() -> None:
    scheduler = paged(token_budget=8)
    add(scheduler, 1, 7)
    for id in (2, 3):
        add(scheduler, id, 7)
    add(scheduler, 4, 2, first=60)
    assert turn(scheduler) == [(1, 0, 7)]
    assert turn(scheduler) == [(1, 7, 1), (2, 4, 3), (3, 4, 3)]


def test_the_last_to_be_admitted_gives_way_and_is_told_nothing_twice() -> None:
    scheduler = paged(blocks=4)
    add(scheduler, 1, 7, max_tokens=4)
    add(scheduler, 2, 7, first=20, max_tokens=9)
    add(scheduler, 3, 2, first=40, max_tokens=1)
    told: dict[int, list[int]] = {1: [], 2: [], 3: []}
    steps = []
    for token in range(50, 90):
        work = scheduler.schedule()
        if work is None:
            break
        steps.append(lengths(work))
        for delta in scheduler.commit(work, [Chosen(token)] * len(work.sampled)):
            told[delta.id] += delta.tokens
    assert steps[:2] == [[(1, 0, 7), (2, 0, 7)], [(1, 7, 1), (2, 7, 1)]]
    assert steps[2] == [(1, 8, 1)]  # on a block of the second's
    assert steps[4] == [(2, 4, 5), (3, 0, 2)]  # which has kept its first block, and comes before the third
    assert [len(tokens) for tokens in told.values()] == [4, 9, 1]
    assert all(tokens == sorted(set(tokens)) for tokens in told.values())
    assert scheduler.figures.preemptions == 1
    assert scheduler.figures.blocks_in_use == 0


def test_a_prompt_gives_way_to_one_that_decodes() -> None:
    scheduler = paged(blocks=4, token_budget=4)
    add(scheduler, 1, 4, max_tokens=3)
    turn(scheduler)
    add(scheduler, 2, 9, first=20)
    assert turn(scheduler) == [(1, 4, 1)]  # three blocks are not there
    scheduler = paged(blocks=4, token_budget=4)
    add(scheduler, 1, 3, max_tokens=3)
    turn(scheduler)
    add(scheduler, 2, 9, first=20)
    assert turn(scheduler) == [(1, 3, 1), (2, 0, 3)]
    assert turn(scheduler) == [(1, 4, 1)]
    assert scheduler.figures.preemptions == 1
    assert turn(scheduler) == [(2, 0, 4)]


def test_a_preempted_request_has_waited_from_its_submission_to_its_first_admission() -> None:
    clock = Clock()
    scheduler = paged(blocks=4, clock=clock)
    clock.tick(1.0, 0.0)
    for id in (1, 2):
        add(scheduler, id, 7, first=20 * id, max_tokens=5)
    clock.tick(2.0, 0.0)
    last = []
    while scheduler.has_work:
        work = next_work(scheduler)
        clock.tick(1.0, 0.0)
        last = scheduler.commit(work, [Chosen(50)] * len(work.sampled))
    assert scheduler.figures.preemptions == 1
    (delta,) = last
    assert (delta.id, delta.queue_s, delta.prefill_s) == (2, 2.0, 1.0)
    assert delta.decode_s == len(range(3, 5 + 3 + 1)) + 1


def test_a_full_queue_refuses() -> None:
    scheduler = scheduler_of(max_seqs=2, max_waiting=1)
    for id in range(3):
        add(scheduler, id, 2)
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        add(scheduler, 3, 2)
    turn(scheduler)
    with pytest.raises(QueueFullError, match="1 requests wait already"):
        add(scheduler, 3, 2)
    scheduler.cancel(0)
    add(scheduler, 3, 2)
