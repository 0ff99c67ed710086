"""Some thousands of spoilt messages to every reader of bytes from the wire (fuzz.py, which takes a million, too)."""

from __future__ import annotations

import pytest

from tests.fuzz import READERS, fuzz


@pytest.mark.parametrize("name", READERS)
def test_nothing_but_errors_of_its_own(name: str) -> None:
    refused = fuzz([name], 1000, seed=1)
    assert 400 < refused[name] <= 1000
