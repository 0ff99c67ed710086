"""Functions that are compiled in several variants, which differ in what they enclose. Knows none of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any], variant: object, *, parallel: bool = False) -> Any:
    """`function`, compiled when first called and kept on disk.

    Its symbol has its name and a number that each process counts for itself: of one name, two variants that different
    processes have compiled could be taken for one another out of numba's cache. So `variant` becomes part of the name.
    """
    function.__qualname__ += f"_{variant}"
    return njit(cache=True, nogil=True, parallel=parallel)(function)
