from __future__ import annotations

from contextlib import suppress

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.engine.follower import follow
from ringlm.engine.messages import SequenceStep, StepMessage, StopMessage, encode
from ringlm.engine.runner import Runner
from ringlm.errors import DesyncError
from ringlm.parallel.communicator import Alone
from ringlm.parallel.shard import Range
from tests.engine.fake import CONTEXT, VOCABULARY, FakeCache, FakeModel

PART = SequenceStep(1, 0, [3, 4], [0], [1])


class Script(Alone):
    """Says the same to everyone: what a root would have sent."""

    def __init__(self, *messages: bytes) -> None:
        self.messages = list(messages)

    def broadcast_bytes(self, data: bytes | None, root: int = 0) -> bytes:
        assert data is None
        return self.messages.pop(0)


def rank_of(*messages: StepMessage | StopMessage | bytes) -> Runner:
    comm = Script(*(message if isinstance(message, bytes) else encode(message) for message in messages))
    return Runner(FakeModel(comm, Range(0, VOCABULARY)), FakeCache(2), comm)


def refused(*messages: StepMessage | StopMessage | bytes) -> str:
    """What the follower says of the last message, of which nothing has run."""
    runner = rank_of(*messages)
    with pytest.raises(DesyncError) as caught:
        follow(runner, runner.comm)
    assert caught.value.rank == 0
    assert len(runner.model.batches) == len(messages) - 1
    return str(caught.value)


def test_runs_steps_until_the_stop() -> None:
    runner = rank_of(StepMessage(4, 0, [PART]), StepMessage(4, 1, [PART], candidates=1), StopMessage(4, 2))
    follow(runner, runner.comm, epoch=4)
    assert [batch.tokens.tolist() for batch in runner.model.batches] == [[3, 4], [3, 4]]


@pytest.mark.parametrize("message", [StepMessage(0, 2, [PART]), StepMessage(1, 1, [PART]), StopMessage(0, 0)])
def test_a_message_out_of_turn(message: StepMessage | StopMessage) -> None:
    what = f"step {message.step} of epoch {message.epoch}; rank 0 expects step 1 of epoch 0"
    assert what in refused(StepMessage(0, 0, [PART]), message)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"tokens": []}, "positions 0 to 0"),
        ({"start": -1}, "positions -1 to 1"),
        ({"start": CONTEXT - 1}, f"positions {CONTEXT - 1} to {CONTEXT + 1} of {CONTEXT}"),
        ({"tokens": [1, VOCABULARY]}, f"token ids outside 0 to {VOCABULARY - 1}"),
        ({"tokens": [-1, 1]}, "token ids"),
        ({"blocks": []}, "positions up to 2 in cache blocks []"),
        ({"blocks": [2]}, "cache blocks [2] of 2"),
        ({"blocks": [0, 2]}, "cache blocks [0, 2] of 2"),
        ({"blocks": [-1]}, "cache blocks [-1]"),
        ({"start": 3}, "positions up to 5 in cache blocks [0] of 2"),
        ({"wanted": [2]}, "logits of [2] of 2"),
        ({"wanted": [-1]}, "logits of [-1]"),
    ],
)
def test_a_step_that_cannot_be_run(changes: dict[str, object], what: str) -> None:
    part = msgspec.structs.replace(PART, **changes)
    message = refused(StepMessage(0, 0, [PART, part]))
    assert what in message
    assert "request 1" in message


def test_a_step_of_nothing() -> None:
    assert "0 sequences" in refused(StepMessage(0, 0, []))
    assert "-1 candidates" in refused(StepMessage(0, 0, [PART], candidates=-1))


@given(st.binary(max_size=60))
@settings(max_examples=200)
def test_garbage(data: bytes) -> None:
    assert "no step message" in refused(data)


@given(st.integers(0, 200), st.integers(0, 255))
@settings(max_examples=300)
def test_a_damaged_message_is_refused_or_still_one(index: int, value: int) -> None:
    """Whatever one byte turns into, the follower raises a DesyncError or goes on to the next message."""
    data = bytearray(encode(StepMessage(0, 0, [PART], candidates=3)))
    data[index % len(data)] = value
    runner = rank_of(bytes(data), StopMessage(0, 1))
    runner.cache.write = lambda *_: None  # a changed start may lie behind positions that nobody wrote
    with suppress(DesyncError):
        follow(runner, runner.comm)


def test_a_length_that_is_not_there() -> None:
    for head in (b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\x91" * 50_000):
        assert "no step message" in refused(head)
    step = encode(StepMessage(0, 0, [PART]))
    assert "no step message" in refused(step.replace(b"\x92\x03\x04", b"\xdd\xff\xff\xff\xff\x03\x04"))
    assert "no step message" in refused(step + b"\x00")
