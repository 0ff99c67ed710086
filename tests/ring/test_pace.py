"""Who is slow: for a whole window, by its own counters, and beside the others."""

from __future__ import annotations

from ringlm.ring.pace import MULTIPLE, WINDOW_S, Paces


def paces(computed_s: dict[int, float], seconds: int = int(WINDOW_S) + 2, collectives: int = 100) -> Paces:
    """Every rank says once a second that it was in so many more collectives and computed for so much longer."""
    found = Paces()
    for second in range(seconds):
        for rank, each_s in computed_s.items():
            found.observe(rank, float(second), second * collectives, second * each_s)
    return found


def test_who_computes_for_a_multiple_of_the_others_time_is_slow() -> None:
    assert paces({0: 0.1, 1: 0.1, 2: 0.5}).slow() == {2: 5.0}
    assert paces({0: 0.1, 1: 0.8}).slow() == {1: 8.0}
    assert paces({0: 0.1, 1: 0.1 * MULTIPLE * 0.99}).slow() == {}


def test_a_moment_or_a_few_collectives_say_nothing() -> None:
    assert paces({0: 0.1, 1: 0.8}, seconds=int(WINDOW_S)).slow() == {}
    assert paces({0: 0.1, 1: 0.8}, collectives=5).slow() == {}
    assert paces({1: 0.8}).slow() == {}


def test_what_was_is_forgotten() -> None:
    found = paces({0: 0.1, 1: 0.8})
    for second in range(100, 100 + int(WINDOW_S) + 2):
        for rank in (0, 1):
            found.observe(rank, float(second), second * 1000, second * 0.1)
    assert found.slow() == {}
