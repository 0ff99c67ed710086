"""The indices of a collective, before any byte moves."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ringlm.ring.plan import Span, chunks, segments


@given(length=st.integers(0, 1000), world_size=st.integers(1, 9))
def test_chunks_cover_everything_once_and_evenly(length: int, world_size: int) -> None:
    spans = chunks(length, world_size)
    assert len(spans) == world_size
    assert [i for span in spans for i in range(*span)] == list(range(length))
    sizes = [span.stop - span.start for span in spans]
    assert max(sizes) - min(sizes) <= 1


@given(start=st.integers(0, 50), size=st.integers(0, 200), length=st.integers(1, 60))
def test_segments_cover_a_chunk_once(start: int, size: int, length: int) -> None:
    spans = segments(Span(start, start + size), length)
    assert [i for span in spans for i in range(*span)] == list(range(start, start + size))
    assert all(0 < span.stop - span.start <= length for span in spans) or (size, len(spans)) == (0, 1)
