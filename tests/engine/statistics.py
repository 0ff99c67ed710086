"""What the tests of randomness compare with."""

from __future__ import annotations

import math


def chi_square_bound(degrees: int) -> float:
    """A value that chi-square exceeds about once in 30,000 (Wilson and Hilferty's approximation at 4 sigma)."""
    part = 2.0 / (9.0 * degrees)
    return degrees * (1.0 - part + 4.0 * math.sqrt(part)) ** 3
