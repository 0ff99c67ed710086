"""What a frontend and its engine process say to each other over their socketpair.

Frontend to engine: Vocabulary, Submit, Embed, Cancel, Ping, Shutdown.
Engine to frontend: Progress, Ready, Recovering, Output, Embedding, Stats, Failed.
Each message is msgpack behind a 4-byte little-endian length (cluster/channel.py).
"""

from __future__ import annotations

import msgspec

from ringlm.engine.news import Figures
from ringlm.engine.news import Output as Output  # a message as it is
from ringlm.engine.request import SamplingParams


class Vocabulary(msgspec.Struct, frozen=True, tag=True):
    """What every token stands for, in bytes; of `special` ones it is their name, which no text means. `ends` are those
    that end an answer. Sent once, before the first request with a grammar."""

    tokens: list[bytes]
    special: list[int]
    ends: list[int]


class Submit(msgspec.Struct, frozen=True, tag=True):
    """A new request. `id` is the frontend's and unique while the request lives. Of its `structured_outputs` there is
    only `grammar`, as llguidance reads it."""

    id: int
    prompt_tokens: list[int]
    params: SamplingParams


class Embed(msgspec.Struct, frozen=True, tag=True):
    """A text to be turned into a vector; answered by an Embedding, or by an Output with an error. `id` as Submit's."""

    id: int
    prompt_tokens: list[int]


class Cancel(msgspec.Struct, frozen=True, tag=True):
    """End request `id`; answered by its last Output (CANCELED), or ignored if it has already ended."""

    id: int


class Ping(msgspec.Struct, frozen=True, tag=True):
    """The frontend is alive. Sent every second; an engine that hears none for 3 s stops its heartbeat."""


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """End every rank."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """Start-up is going on. `stage` is 'connect', 'load' or in words for whom it waits; done of total bytes (0 of 0:
    unknown)."""

    stage: str
    done: int = 0
    total: int = 0


class RankReport(msgspec.Struct, frozen=True):
    """What one rank has loaded. `peak_bytes` is the most memory that was resident so far, mapped files included."""

    device: str
    threads: int
    weights_bytes: int
    peak_bytes: int
    host: str = ""  # its machine's name


class MeasuredLink(msgspec.Struct, frozen=True):
    """What was measured between two ranks, the lower first, of different hosts, before ranks were given."""

    rank: int
    other: int
    round_trip_s: float
    to_other_bytes_per_s: float
    from_other_bytes_per_s: float


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Every rank has loaded, for the first time or again. What the frontend may promise from here on."""

    model: str
    world_size: int
    context: int
    vocabulary: int
    eos_token_ids: list[int]
    dtype: str
    quant: str
    ranks: list[RankReport]
    epoch: int = 0
    recoveries: int = 0  # how often the ring was formed again
    full_world_size: int = 0  # what it was at the start, and is to be again
    measured: list[MeasuredLink] = []


class Recovering(msgspec.Struct, frozen=True, tag=True):
    """The ring has ended because of `rank`, or to take in more, and is being formed again; Ready follows when it is, or
    Failed."""

    rank: int | None
    reason: str


class Embedding(msgspec.Struct, frozen=True, tag=True):
    """The vector of request `id`: the normalized hidden state after its last token, as float32 bytes."""

    id: int
    vector: bytes


class LinkStats(msgspec.Struct, frozen=True):
    """What rank 0 knows of its link to `rank`: bytes so far, and the control link's last round trip."""

    rank: int
    sent_bytes: int
    received_bytes: int
    round_trip_s: float | None = None


class Stats(Figures, frozen=True, tag=True):
    """How the engine does. Sent every second while there is work, and once after it; counters count from the start."""

    links: list[LinkStats]
    spares: int = 0  # that wait to take the place of a lost rank
    recoveries: int = 0  # how often the ring was formed again
    slow: dict[int, float] = msgspec.field(
        default_factory=dict
    )  # by rank, who computes for how many times as long as the others
    # Links without rank 0: lower rank, higher, bytes there and back
    others: list[tuple[int, int, int, int]] = msgspec.field(default_factory=list)
    at_s: float = 0.0  # when it was so, by a clock of the engine's


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The engine has ended. `kind` is the class name of a RingLMError, or 'InternalError'."""

    kind: str
    message: str
    rank: int | None = None


ToEngine = Vocabulary | Submit | Embed | Cancel | Ping | Shutdown
ToFrontend = Progress | Ready | Recovering | Output | Embedding | Stats | Failed
