"""What a fetch brings: records one by one, or all at once that are there.

It knows neither cache nor disk. Invariant: it holds no lease; whoever takes one decides how long the record stays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from undercroft.store.record import Key
from undercroft.store.slab import Lease


class Arrivals:
    """An iterator of what was asked for, in the order in which it comes.

    Args:
        take: waits until something is there that was not taken, and gives at most so many of it; all where that is
            None; nothing once everything was taken.
    """

    __slots__ = ("_take",)

    def __init__(self, take: Callable[[int | None], list[tuple[Key, Lease]]]) -> None:
        self._take = take

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Key, Lease]:
        for each in self._take(1):
            return each
        raise StopIteration

    def together(self) -> list[tuple[Key, Lease]]:
        """All that is there and was not taken; waits for the first. Nothing once everything was taken."""
        return self._take(None)


NOTHING = Arrivals(lambda most: [])
"""What was asked for by nobody."""
