from __future__ import annotations

import numpy as np
import pytest

from ringlm.engine.randomness import philox, uniform
from tests.engine.statistics import chi_square_bound


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Random123, the authors' own library
        ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    assert philox(counter, key) == words


@pytest.mark.parametrize("seed", [0, 1, 42, 2**32, 2**64 - 1])
def test_uniform_over_positions(seed: int) -> None:
    draws = np.array([uniform(seed, position) for position in range(20_000)])
    assert ((draws >= 0) & (draws < 1)).all()
    observed, _ = np.histogram(draws, 50, (0.0, 1.0))
    assert ((observed - 400.0) ** 2 / 400.0).sum() < chi_square_bound(49)
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.03


def test_uniform_over_seeds() -> None:
    """Requests with neighbouring seeds are independent at every position."""
    draws = np.array([[uniform(seed, position) for seed in range(2_000)] for position in (0, 1, 500)])
    for row in draws:
        observed, _ = np.histogram(row, 20, (0.0, 1.0))
        assert ((observed - 100.0) ** 2 / 100.0).sum() < chi_square_bound(19)
    assert np.abs(np.corrcoef(draws) - np.eye(3)).max() < 0.08


def test_all_64_bits_of_seed_and_position_count() -> None:
    draws = {uniform(1 << bit, 0) for bit in range(64)} | {uniform(0, 1 << bit) for bit in range(64)}
    assert len(draws) == 128
    assert uniform(-1, 5) == uniform(2**64 - 1, 5)
