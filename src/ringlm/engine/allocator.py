"""Which cache blocks are held by sequences, and which hold the start of what: the prefix cache. Knows block numbers and
token ids, not what lies in the blocks.

A block whose tokens are known is found by them and by what comes before: a key is the number of the prefix that the
block continues, and its own tokens, so that equal keys mean equal prefixes. A block that nobody holds any more stays
findable until it is needed; the least recently held goes first, and of one sequence's the last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

_Key: TypeAlias = tuple[int, tuple[int, ...]]


class Prefix(NamedTuple):
    """Tokens that are computed: the blocks that hold them, and the number by which they are known; 0: no tokens."""

    blocks: list[int]
    number: int


class BlockAllocator:
    """Blocks 0 to `count` - 1, of `size` positions each."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size = count, size
        self._holders = [0] * count  # how many sequences hold each
        self._empty = bytearray(b"\1" * count)  # 1: nobody holds it, and nothing is known of it
        self._empty_count = count
        self._idle: dict[int, None] = {}  # known blocks that nobody holds, the least recently held first
        self._known: dict[_Key, tuple[int, int]] = {}  # block, and the number of the prefix that it ends
        self._key_of: dict[int, _Key] = {}  # by block
        self._numbers = 0

    @property
    def free_count(self) -> int:
        """Blocks that nobody holds."""
        return self._empty_count + len(self._idle)

    @property
    def idle_count(self) -> int:
        """Those of them whose tokens are known."""
        return len(self._idle)

    def longest_known(self, tokens: Sequence[int]) -> Prefix:
        """The longest known prefix of `tokens`, in whole blocks; the last token is never in it."""
        blocks, number = [], 0
        for start in range(0, len(tokens) - self.size, self.size):
            found = self._known.get((number, tuple(tokens[start : start + self.size])))
            if found is None:
                break
            block, number = found
            blocks.append(block)
        return Prefix(blocks, number)

    def hold(self, blocks: Sequence[int]) -> None:
        """Hold known blocks, beside those who do already."""
        for block in blocks:
            if not self._holders[block]:
                del self._idle[block]
            self._holders[block] += 1

    def allocate(self, count: int, after: int | None = None) -> list[int] | None:
        """`count` blocks that nobody holds, now held, as few runs as there can be; None if there are too few. The first
        follows block `after` where that is possible."""
        if count > self.free_count:
            return None
        while self._empty_count < count:
            self._forget(next(iter(self._idle)))
        blocks: list[int] = []
        for left in range(count, 0, -1):
            following = None if after is None else after + 1
            if following is None or following == self.count or not self._empty[following]:
                following = self._roomiest(left)
            self._empty[following] = 0
            self._empty_count -= 1
            self._holders[following] = 1
            blocks.append(following)
            after = following
        return blocks

    def learn(self, number: int, tokens: Sequence[int], block: int) -> int:
        """`block` is computed, and holds `tokens` behind the prefix `number`: the number of the prefix that they end.
        Where another block holds the same, that one stays the known one."""
        key = number, tuple(tokens)
        if key not in self._known:
            self._numbers += 1
            self._known[key] = block, self._numbers
            self._key_of[block] = key
        return self._known[key][1]

    def free(self, blocks: Sequence[int]) -> None:
        """One holder fewer for each of a sequence's `blocks`; ValueError for one that nobody holds, since then two
        sequences may write to it."""
        for block in reversed(blocks):
            if not (0 <= block < self.count and self._holders[block]):
                raise ValueError(f"block {block} of {self.count} is not held")
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            if block in self._key_of:
                self._idle[block] = None
            else:
                self._empty[block] = 1
                self._empty_count += 1

    def _forget(self, block: int) -> None:
        """Make an idle block an empty one."""
        del self._idle[block], self._known[self._key_of.pop(block)]
        self._empty[block] = 1
        self._empty_count += 1

    def _roomiest(self, count: int) -> int:
        """Where to begin `count` blocks: in the longest stretch of empty ones, in its middle if it is what another
        sequence grows into and there is room enough."""
        first, end = max(
            (match.span() for match in re.finditer(b"\1+", self._empty)), key=lambda span: span[1] - span[0]
        )
        middle = (first + end) // 2
        return middle if first and self._holders[first - 1] and end - middle >= count else first
