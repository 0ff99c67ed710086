"""The turn of every rank but 0: wait for rank 0's message, run it, until it says stop. Knows no requests."""

from __future__ import annotations

import msgspec

from ringlm.engine.messages import Message, StopMessage, decode
from ringlm.engine.runner import Runner
from ringlm.engine.step import check
from ringlm.errors import DesyncError
from ringlm.parallel.communicator import Communicator


def follow(runner: Runner, comm: Communicator, *, epoch: int = 0) -> bool:
    """Run rank 0's steps of `epoch`, in order from 0, until it says stop; whether it wants to go on in another epoch.

    Raises DesyncError for a message that is not the next one or cannot be run; nothing of it has run then.
    """
    limits = {
        "context": runner.model.config.context,
        "blocks": runner.cache.blocks,
        "block": runner.cache.block,
        "vocabulary": runner.model.config.vocabulary,
    }
    step = 0
    while True:
        message = _read(comm.broadcast_bytes(None))
        if (message.epoch, message.step) != (epoch, step):
            raise DesyncError(
                f"rank 0 sent step {message.step} of epoch {message.epoch}; rank {comm.rank} expects step {step} of "
                f"epoch {epoch}.",
                0,
            )
        if isinstance(message, StopMessage):
            return message.again
        check(message, **limits)
        runner.run(message)
        step += 1


def _read(data: bytes) -> Message:
    try:
        return decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # the latter for a damaged tag
        raise DesyncError(f"rank 0 sent {len(data)} bytes that are no step message: {error}", 0) from error
