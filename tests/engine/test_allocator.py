from __future__ import annotations

import pytest

from ringlm.engine.allocator import BlockAllocator


def test_lowest_free_block_first() -> None:
    allocator = BlockAllocator(3)
    assert [allocator.allocate() for _ in range(4)] == [0, 1, 2, None]
    allocator.free(2)
    allocator.free(0)
    assert allocator.free_count == 2
    assert allocator.allocate() == 0


@pytest.mark.parametrize("block", [-1, 1, 2, 7])
def test_freeing_a_block_that_is_not_taken_is_an_error(block: int) -> None:
    allocator = BlockAllocator(3)
    allocator.allocate()
    with pytest.raises(ValueError, match=f"block {block} of 3"):
        allocator.free(block)
    assert allocator.free_count == 2


def test_double_free_is_an_error() -> None:
    allocator = BlockAllocator(1)
    allocator.allocate()
    allocator.free(0)
    with pytest.raises(ValueError):
        allocator.free(0)
