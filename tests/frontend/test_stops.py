"""Stop strings: the text is cut at the stop that is complete first, however the text comes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringlm.frontend.stops import StopStrings

letters = st.text("abc", max_size=30)
stop_lists = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4)


def through(stops: list[str], pieces: list[str]) -> tuple[str, str | None]:
    scanner = StopStrings(stops)
    text = "".join(scanner.push(piece) for piece in pieces) + scanner.finish()
    return text, scanner.found


def first_complete(stops: list[str], text: str) -> tuple[str, str | None]:
    """The rule, written the slow way."""
    for end in range(len(text) + 1):
        for stop in sorted(stops, key=len, reverse=True):
            if text[:end].endswith(stop):
                return text[: end - len(stop)], stop
    return text, None


@given(stop_lists, letters, st.data())
def test_any_cut_gives_the_same_text(stops: list[str], text: str, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert through(stops, pieces) == first_complete(stops, text)


@given(stop_lists, letters)
def test_what_was_let_through_is_never_part_of_a_stop(stops: list[str], text: str) -> None:
    scanner = StopStrings(stops)
    shown = ""
    for character in text:
        shown += scanner.push(character)
        assert not any(stop in shown for stop in stops)
    assert first_complete(stops, text)[0].startswith(shown)


def test_nothing_is_held_without_a_reason() -> None:
    scanner = StopStrings(["</end>", "\n\n"])
    assert scanner.push("one < two") == "one < two"
    assert scanner.push("\n") == ""
    assert scanner.push("three </e") == "\nthree "
    assert scanner.push("nd> four") == ""
    assert scanner.found == "</end>"
    assert scanner.finish() == ""


@pytest.mark.parametrize("text", ["", "abc"])
def test_no_stop_strings(text: str) -> None:
    assert through([], [text]) == (text, None)
