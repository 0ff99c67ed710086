"""Which elements go where in a collective: indices only, decided before any byte moves."""

from __future__ import annotations

import itertools
from typing import NamedTuple


class Span(NamedTuple):
    """Elements start to stop of a flat tensor."""

    start: int
    stop: int


def chunks(length: int, world_size: int) -> list[Span]:
    """One chunk a rank, in rank order, whose sizes differ by at most one element."""
    base, more = divmod(length, world_size)
    edges = [rank * base + min(rank, more) for rank in range(world_size + 1)]
    return [Span(a, b) for a, b in itertools.pairwise(edges)]


def segments(chunk: Span, length: int) -> list[Span]:
    """`chunk` cut into pieces of at most `length` elements; one, empty, of an empty chunk."""
    starts = range(chunk.start, chunk.stop, length) or [chunk.start]
    return [Span(start, min(start + length, chunk.stop)) for start in starts]
