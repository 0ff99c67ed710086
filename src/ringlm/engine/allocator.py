"""Which cache blocks are taken. Knows block numbers, not what lies in them."""

from __future__ import annotations

import heapq


class BlockAllocator:
    """Blocks 0 to `count` - 1, given out lowest first, so that runs repeat and memory stays dense."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count))  # a heap
        self._taken: set[int] = set()

    @property
    def free_count(self) -> int:
        return len(self._free)

    def allocate(self) -> int | None:
        """The lowest free block, now taken; None when all are."""
        if not self._free:
            return None
        block = heapq.heappop(self._free)
        self._taken.add(block)
        return block

    def free(self, block: int) -> None:
        """Give `block` back; ValueError if it is not taken, since then two sequences may share it."""
        if block not in self._taken:
            raise ValueError(f"block {block} of {self.count} is not taken")
        self._taken.remove(block)
        heapq.heappush(self._free, block)
