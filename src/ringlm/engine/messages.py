"""The step message: what rank 0 tells every rank to compute next. Token ids only; docs/protocol.md has the bytes."""

from __future__ import annotations

import msgspec


class SequenceStep(msgspec.Struct, frozen=True, array_like=True):
    """One sequence's part of a step.

    `tokens` go to positions start, start+1, … of the sequence; `blocks` are the cache blocks that
    hold it, in order. Before anything is written the cached sequence is cut to `truncate` positions
    (-1: leave it). `wanted` are offsets into `tokens` whose logits rank 0 needs.
    """

    id: int
    start: int
    tokens: list[int]
    blocks: list[int]
    wanted: list[int]
    truncate: int = -1
    adapter: int = 0


class StepMessage(msgspec.Struct, frozen=True, array_like=True, tag_field="t", tag="step"):
    """One turn of the engine. `candidates` is how many of each rank's best logits to send to rank 0
    for each wanted position; 0 sends all of them. With `log_sums` the logarithm of the sum of exp(logit) of all
    follows the candidates."""

    epoch: int
    step: int
    sequences: list[SequenceStep]
    candidates: int = 0
    log_sums: bool = False


class StopMessage(msgspec.Struct, frozen=True, array_like=True, tag_field="t", tag="stop"):
    """Rank 0 is done: daemons end with status 0, or go to meet it `again`."""

    epoch: int
    step: int
    again: bool = False


Message = StepMessage | StopMessage

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[Message] = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """The message as msgpack bytes."""
    return _encoder.encode(message)


def decode(data: bytes | memoryview) -> Message:
    """The message in `data`; raises `msgspec.ValidationError` or `msgspec.DecodeError` for anything else."""
    return _decoder.decode(data)
