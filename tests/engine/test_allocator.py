from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringlm.engine.allocator import BlockAllocator, Prefix

SIZE = 2


def learn(allocator: BlockAllocator, tokens: list[int], blocks: list[int]) -> int:
    """As a sequence does that has computed `tokens`; the number of the prefix."""
    number = 0
    for index, block in enumerate(blocks):
        number = allocator.learn(number, tokens[index * SIZE : (index + 1) * SIZE], block)
    return number


def test_blocks_follow_one_another_where_they_can() -> None:
    allocator = BlockAllocator(16, SIZE)
    assert allocator.allocate(2) == [0, 1]
    assert allocator.allocate(3) == [9, 10, 11]  # in the middle of what the first one grows into
    assert allocator.allocate(1, after=1) == [2]
    allocator.free([9, 10, 11])
    assert allocator.allocate(1, after=2) == [3]
    assert allocator.allocate(12) == list(range(4, 16))  # where there is no room in the middle, at once
    assert allocator.free_count == 0
    assert allocator.allocate(1) is None
    allocator.free([7, 3])
    assert allocator.allocate(2, after=15) in ([3, 7], [7, 3])


def test_too_few_blocks_are_none_at_all() -> None:
    allocator = BlockAllocator(3, SIZE)
    assert allocator.allocate(4) is None
    assert allocator.free_count == 3
    assert allocator.allocate(0) == []


@pytest.mark.parametrize("block", [-1, 1, 2, 7])
def test_freeing_a_block_that_nobody_holds_is_an_error(block: int) -> None:
    allocator = BlockAllocator(3, SIZE)
    allocator.allocate(1)
    with pytest.raises(ValueError, match=f"block {block} of 3"):
        allocator.free([block])
    assert allocator.free_count == 2


def test_a_known_prefix_is_found_while_it_is_held_and_after() -> None:
    allocator = BlockAllocator(4, SIZE)
    blocks = allocator.allocate(2)
    assert blocks is not None
    assert allocator.longest_known([1, 2, 3, 4, 5]) == Prefix([], 0)
    number = learn(allocator, [1, 2, 3, 4], blocks)
    for _ in range(2):
        assert allocator.longest_known([1, 2, 3, 4, 5]) == Prefix([0, 1], number)
        assert allocator.longest_known([1, 2, 3, 4]).blocks == [0]  # the last token is to be computed
        assert allocator.longest_known([1, 2, 9, 4, 5]).blocks == [0]
        assert allocator.longest_known([3, 4, 5]).blocks == []  # nothing comes before them here
        if allocator.idle_count == 0:
            allocator.free(blocks)
    assert (allocator.free_count, allocator.idle_count) == (4, 2)


def test_shared_blocks_are_free_once_the_last_holder_has_gone() -> None:
    allocator = BlockAllocator(4, SIZE)
    blocks = allocator.allocate(1)
    assert blocks == [0]
    learn(allocator, [1, 2], blocks)
    allocator.hold(blocks)
    allocator.free(blocks)
    assert allocator.free_count == 3
    allocator.free(blocks)
    assert allocator.free_count == 4
    allocator.hold(blocks)
    assert (allocator.free_count, allocator.idle_count) == (3, 0)


def test_the_least_recently_held_is_forgotten_first_and_of_one_sequence_the_last() -> None:
    allocator = BlockAllocator(5, SIZE)
    first, second = allocator.allocate(2), allocator.allocate(2)
    assert first is not None
    assert second is not None
    learn(allocator, [1, 2, 3, 4], first)
    learn(allocator, [5, 6, 7, 8], second)
    allocator.free(second)
    allocator.free(first)
    allocator.hold(second)
    allocator.free(second)  # now it is the one held last

    def found() -> tuple[int, int]:
        return len(allocator.longest_known([1, 2, 3, 4, 0]).blocks), len(
            allocator.longest_known([5, 6, 7, 8, 0]).blocks
        )

    assert found() == (2, 2)
    taken = []
    for left in ((2, 2), (1, 2), (0, 2), (0, 1), (0, 0)):
        taken += allocator.allocate(1) or []
        assert found() == left
    assert sorted(taken) == [0, 1, 2, 3, 4]


def test_of_equal_blocks_one_is_known() -> None:
    """Two sequences that computed the same at once go on behind the same prefix."""
    allocator = BlockAllocator(4, SIZE)
    first, second = allocator.allocate(1), allocator.allocate(2)
    assert first is not None
    assert second is not None
    one, other = learn(allocator, [1, 2], first), learn(allocator, [1, 2, 3, 4], second)
    assert one != other
    assert allocator.longest_known([1, 2, 3, 4, 0]).blocks == [first[0], second[1]]
    allocator.free(second)
    assert allocator.idle_count == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=7), st.integers(0, 3)), max_size=30))
def test_what_is_found_is_what_was_written(requests: list[tuple[list[int], int]]) -> None:
    """Sequences over two tokens come, and some go, in a cache that is too small to know them all."""
    allocator = BlockAllocator(9, SIZE)
    written: dict[int, list[int]] = {}
    held: list[list[int]] = []
    for tokens, back in requests:
        if held and back:
            allocator.free(held.pop(-back % len(held)))
        prefix = allocator.longest_known(tokens)
        assert [token for block in prefix.blocks for token in written[block]] == tokens[: len(prefix.blocks) * SIZE]
        allocator.hold(prefix.blocks)
        more = allocator.allocate(-(-len(tokens) // SIZE) - len(prefix.blocks))
        if more is None:
            allocator.free(prefix.blocks)
            continue
        blocks, number = prefix.blocks + more, prefix.number
        for index in range(len(prefix.blocks), len(tokens) // SIZE):
            mine = tokens[index * SIZE : (index + 1) * SIZE]
            written[blocks[index]] = mine
            number = allocator.learn(number, mine, blocks[index])
        held.append(blocks)
        assert allocator.free_count == 9 - len({block for blocks in held for block in blocks})
    for blocks in held:
        allocator.free(blocks)
    assert allocator.free_count == 9
