"""In which order saved storages are wanted: learned from the last recorded step, guessed before there is one.

Pure. A step is seen as a sequence of hook calls, each a pack or an unpack of the storage with some number (its place
among the storages first saved in the step). Invariant: while `holds`, every call so far was the one learned.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence

Call = int
"""`number` for a pack of storage `number`, `~number` for an unpack of it."""


class Order:
    """The calls of a learned step, and how far the present one has come.

    Args:
        calls: the learned calls; none for a guess: what was saved last is wanted first.
    """

    def __init__(self, calls: Sequence[Call] = ()) -> None:
        self.calls = list(calls)
        self._unpacks: dict[int, list[int]] = {}
        for position, call in enumerate(self.calls):
            if call < 0:
                self._unpacks.setdefault(~call, []).append(position)
        self._position = 0
        self.holds = bool(calls)

    @property
    def turns(self) -> bool:
        """Whether the last call was a pack and the next is an unpack: the end of a forward."""
        here = self._position
        return self.holds and 0 < here < len(self.calls) and self.calls[here - 1] >= 0 > self.calls[here]

    def restart(self) -> None:
        """Begin the next step."""
        self._position = 0
        self.holds = bool(self.calls)

    def advance(self, call: Call) -> None:
        """Take note of a call."""
        self.holds = self.holds and self._position < len(self.calls) and self.calls[self._position] == call
        self._position += 1

    def next_use(self, number: int) -> float:
        """When storage `number` is unpacked next: smaller is sooner, infinity is never."""
        if not self.holds:
            return -number
        unpacks = self._unpacks.get(number, [])
        index = bisect_right(unpacks, self._position - 1)
        return unpacks[index] if index < len(unpacks) else math.inf

    def upcoming(self, last_unpacked: int) -> Iterator[int]:
        """Numbers of the storages in the order in which they will be unpacked next; may repeat."""
        if self.holds:
            yield from (~call for call in self.calls[self._position :] if call < 0)
        else:
            yield from range(last_unpacked - 1, -1, -1)
