"""Which parts of a linear space are free: the allocator behind the slab and the spill file.

Pure: it hands out offsets and touches no bytes. The lowest offset that fits is taken, so that what is in use stays
together at the low end and the high end can be given back to the system. Invariant: free ranges are sorted,
disjoint and never adjacent; every offset is a multiple of the granularity.
"""

from __future__ import annotations

from bisect import bisect_left

BLOCK = 4096
"""Bytes to which offsets, lengths and addresses are aligned: what O_DIRECT asks for on every file system known."""


def round_up(nbytes: int, granularity: int = BLOCK) -> int:
    """The least multiple of `granularity` that is not below `nbytes`."""
    return -(-nbytes // granularity) * granularity


class FreeRanges:
    """A space of `size` bytes that starts all free and may grow at its end."""

    def __init__(self, size: int = 0, *, granularity: int = BLOCK) -> None:
        self._granularity = granularity
        self._starts: list[int] = []
        self._lengths: list[int] = []
        self.size = 0
        self.grow(size)

    @property
    def free(self) -> int:
        """Bytes not taken."""
        return sum(self._lengths)

    def free_ranges(self) -> list[tuple[int, int]]:
        """All free (offset, nbytes), in ascending order."""
        return list(zip(self._starts, self._lengths, strict=True))

    def take(self, nbytes: int) -> int | None:
        """The lowest offset at which `nbytes` (rounded up to the granularity) are free, now taken; None if nowhere."""
        need = round_up(nbytes, self._granularity)
        for index, length in enumerate(self._lengths):
            if length >= need:
                return self._cut(index, need)
        return None

    def give(self, offset: int, nbytes: int) -> None:
        """Return what `take` gave, with the same number of bytes."""
        length = round_up(nbytes, self._granularity)
        index = bisect_left(self._starts, offset)
        if index < len(self._starts) and offset + length == self._starts[index]:
            length += self._lengths[index]
            del self._starts[index], self._lengths[index]
        if index and self._starts[index - 1] + self._lengths[index - 1] == offset:
            self._lengths[index - 1] += length
            return
        self._starts.insert(index, offset)
        self._lengths.insert(index, length)

    def grow(self, nbytes: int) -> None:
        """Add free bytes at the end."""
        length = round_up(nbytes, self._granularity)
        self.size += length
        if length:
            self.give(self.size - length, length)

    def cut_tail(self, keep: int = 0) -> int:
        """Remove what is free at the end, but for the first `keep` bytes of the space; returns the bytes removed."""
        if not self._starts or self._starts[-1] + self._lengths[-1] != self.size:
            return 0
        start = self._starts.pop()
        self._lengths.pop()
        before, self.size = self.size, start
        self.grow(max(0, min(keep, before) - start))
        return before - self.size

    def _cut(self, index: int, need: int) -> int:
        offset = self._starts[index]
        if self._lengths[index] == need:
            del self._starts[index], self._lengths[index]
        else:
            self._starts[index] += need
            self._lengths[index] -= need
        return offset
